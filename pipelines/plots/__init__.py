"""Pictures of a run: each a pure function of arrays that writes one PNG and returns its path.

Nothing here reads storage or keeps global state (no pyplot), so a picture can be drawn in any process or thread.
"""

from pipelines.plots.curves import bound_figure, distances_figure, loss_figure, schedule_figure
from pipelines.plots.grids import generated_beside_real, image_grid, trajectory_figure
from pipelines.plots.sweep import sweep_figure

__all__ = [
    "bound_figure",
    "distances_figure",
    "generated_beside_real",
    "image_grid",
    "loss_figure",
    "schedule_figure",
    "sweep_figure",
    "trajectory_figure",
]
