"""The same head in idiomatic PyTorch, as fast as it could be made: what `benchmarks/compare.py` measures against.

`convert` carries weights, stages and frames over; `head` and `training` use `motion`, `losses` and a rasterizer: on a
CPU `raster`, on a GPU gsplat 1.5.3. Everything but `convert` imports torch and numpy alone.
"""
