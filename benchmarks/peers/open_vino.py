"""OpenVINO, the whole picture at once, in float32 or bfloat16."""

import openvino
from serve import options, picture, serve

core, image = openvino.Core(), picture()
model = core.read_model(options()["onnx"])
model.reshape(list(image.shape))
settings = {
    "INFERENCE_NUM_THREADS": options()["threads"],
    "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[options()["precision"]],
    "PERFORMANCE_HINT": "LATENCY",
}
compiled = core.compile_model(model, "CPU", settings)
serve(lambda: compiled(image)[0])
