"""Hold the results of the paper, with which runs on the same benchmark are compared.

Source: Yin et al., TransFGU (ECCV 2022), Table 1. Percent, on the benchmark's validation set.
"""

from typing import NamedTuple


class Result(NamedTuple):
    """One method on one benchmark, in percent."""

    method: str
    mean_iou: float
    pixel_accuracy: float


OURS = "TransFGU, published"

METHODS = {
    "transfgu": OURS,
    "iic": "IIC",
    "picie": "PiCIE",
    "picie-no-aux": "PiCIE without auxiliary clustering",
    "maskcontrast": "MaskContrast",
}
"""Names of methods in the tables below, by the value of `--method`."""

TABLE_1: dict[str, tuple[Result, ...]] = {
    "coco-stuff-27-curated": (
        Result("IIC", 6.71, 21.79),
        Result("PiCIE without auxiliary clustering", 13.84, 48.09),
        Result("PiCIE", 14.36, 49.99),
        Result(OURS, 17.47, 52.66),
    ),
    "coco-stuff-27": (
        Result("IIC", 2.36, 21.02),
        Result("PiCIE", 11.88, 37.20),
        Result(OURS, 16.19, 44.52),
    ),
    "coco-stuff-171": (
        Result("IIC", 0.64, 8.67),
        Result("PiCIE", 4.56, 24.66),
        Result(OURS, 11.93, 34.32),
    ),
    "cityscapes": (
        Result("IIC", 6.35, 47.88),
        Result("PiCIE", 12.31, 65.50),
        Result(OURS, 16.83, 77.92),
    ),
    "coco-80": (Result("MaskContrast", 3.73, 8.81), Result(OURS, 12.69, 64.31)),
    "pascal-voc": (Result("MaskContrast", 35.00, 79.84), Result(OURS, 37.15, 83.59)),
    "lip-5": (Result(OURS, 25.16, 65.76),),
    "lip-16": (Result(OURS, 15.49, 60.08),),
    "lip-19": (Result(OURS, 12.24, 42.52),),
}
"""Methods by preset, weakest first."""
