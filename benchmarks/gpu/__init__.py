"""What only a GPU can tell, measured by one script: run.py. Each case is also there in small, for a CPU."""
