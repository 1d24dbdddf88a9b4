"""How a UNet is judged: pictures, features, measurements, metrics, intervals, numbers.

Imports diffusion and the rooms below, never training. Rendering and measuring serve baseline and evaluate;
`metrics`, `intervals` and `report` serve report, so that another statistic renders no picture again.
"""
