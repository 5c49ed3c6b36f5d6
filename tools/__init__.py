"""Stand-alone tools."""
