"""What is written and read again: run directories, weights, model cards, exports."""
