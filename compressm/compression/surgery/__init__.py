"""The one room that mutates: parameters, optimizer state and averages change together, or not at all."""
