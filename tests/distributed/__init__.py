"""Helpers of the tests with several processes; a package, so that the name is this folder's."""
