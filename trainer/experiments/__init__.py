"""The paper's experiments: variants of a recipe, each trained with each seed, compared in pairs."""
