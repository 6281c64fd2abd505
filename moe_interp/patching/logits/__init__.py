"""What is written directly towards the logits."""
