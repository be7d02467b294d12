"""Steps 2 to 4: a super-resolution network, fine-tuned on one photograph or distilled from a large one."""
