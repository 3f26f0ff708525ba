"""A point that tests of rows and reports share: a decode step of the bench's own model."""

POINT = {
    "model": "toy",
    "slice": "cpu:2x2x2",
    "phase": "decode",
    "batch": 8,
    "length": 1,
    "context": 16,
    "layout": "ws2d",
    "attention": "batch",
    "weights": "f32",
}
