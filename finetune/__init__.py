"""Tools that prepare data for fine-tuning."""
