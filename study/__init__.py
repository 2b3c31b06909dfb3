"""What SCFlow is compared with, and how. Scripts run as `python -m study.ablation losses`."""
