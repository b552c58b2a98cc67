"""What several defenses are made of; nothing here is a method."""
