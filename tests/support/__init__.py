"""Promises that every implementation of an interface keeps, as test classes to inherit."""
