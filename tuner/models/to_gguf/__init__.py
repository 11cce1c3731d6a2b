"""Models as GGUF files for llama.cpp and Ollama; the only folder that imports the package `gguf`."""
