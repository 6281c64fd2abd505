"""One run: the loop, its optimiser step, and the folder that it resumes from."""
