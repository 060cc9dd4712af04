"""Input reconstruction: what is put before a model to undo perturbations. Believe only what adaptive attacks leave."""
