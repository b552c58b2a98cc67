"""What bdjax costs, beside a lean PyTorch loop that does the same work in the same run."""
