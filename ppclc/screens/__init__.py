"""Words, drawings, charts and progress."""
