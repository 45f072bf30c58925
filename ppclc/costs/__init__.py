"""What blocks and students cost, from configurations alone."""
