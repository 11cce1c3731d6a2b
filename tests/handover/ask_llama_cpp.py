"""Ask llama.cpp about GGUF files, in its own environment: a list of questions in JSON on stdin, the answers on stdout.

A question: {"model": FILE, "lora": FILE or null, "texts": texts to read as ids, "rows": rows of ids whose logits are
wanted, "prompts": rows of ids and "chats": lists of messages to answer greedily, "new": tokens at most}.
"""

import json
import sys

import llama_cpp


def answer(question: dict) -> dict:
    vocab_only = not any(question.get(name) for name in ("rows", "prompts", "chats"))
    llama = llama_cpp.Llama(
        question["model"],
        lora_path=question.get("lora"),
        n_ctx=512,
        n_threads=1,
        n_batch=512,
        logits_all=bool(question.get("rows")),
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        vocab_only=vocab_only,
        verbose=False,
    )
    new = question.get("new", 24)
    return {
        "ids": [
            llama.tokenize(text.encode(), add_bos=False, special=True) for text in question.get("texts", ())
        ],
        "begin": [
            llama.tokenize(text.encode(), add_bos=True, special=True) for text in question.get("texts", ())
        ],
        "logits": [logits(llama, row) for row in question.get("rows", ())],
        "answers": [greedy(llama, prompt, new) for prompt in question.get("prompts", ())],
        "chats": [chat(llama, messages, new) for messages in question.get("chats", ())],
    }


def logits(llama: llama_cpp.Llama, row: list[int]) -> list[list[float]]:
    llama.reset()
    llama.eval(row)
    return llama.scores[: len(row)].tolist()


def greedy(llama: llama_cpp.Llama, prompt: list[int], new: int) -> list[int]:
    """The ids of an answer, with the token that ends it."""
    ids = []
    vocabulary = llama_cpp.llama_model_get_vocab(llama._model.model)
    for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0, reset=True):
        ids.append(token)
        if len(ids) == new or llama_cpp.llama_vocab_is_eog(vocabulary, token):
            break
    return ids


def chat(llama: llama_cpp.Llama, messages: list[dict], new: int) -> str:
    """An answer by the chat template in the file."""
    reply = llama.create_chat_completion(messages, temperature=0.0, repeat_penalty=1.0, max_tokens=new)
    return reply["choices"][0]["message"]["content"]


if __name__ == "__main__":
    print(json.dumps([answer(question) for question in json.load(sys.stdin)]))
