"""One point for tests of rows and reports: a decode step of the toy model on eight fake devices."""

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
