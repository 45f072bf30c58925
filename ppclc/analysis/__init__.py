"""What a teacher tells of what could go, and the search for a plan."""
