"""Pictures of what a model attends to and has learned."""
