"""Studies: grids of trainings and their evaluation, as in the papers' tables and figures."""
