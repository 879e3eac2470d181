"""What a run costs, measured: training beside a plain PyTorch implementation."""
