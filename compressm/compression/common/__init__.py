"""What every room of compression uses and none owns."""
