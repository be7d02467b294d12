"""ONNX Runtime, the whole picture at once."""

import onnxruntime
from serve import options, picture, serve

settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = options()["threads"]
session = onnxruntime.InferenceSession(options()["onnx"], settings, providers=["CPUExecutionProvider"])
image = picture()
serve(lambda: session.run(None, {"x": image})[0])
