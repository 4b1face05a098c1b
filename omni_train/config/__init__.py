"""Typed configuration: registration, composition, errors. Schemas stand elsewhere."""
