"""Networks that train in place of the whole model (LoRA and its relatives), and the tools around their files."""
