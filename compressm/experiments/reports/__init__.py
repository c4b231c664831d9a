"""What a command reports: numbers, words, pictures, a page."""
