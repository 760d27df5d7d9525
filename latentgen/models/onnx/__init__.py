"""The ONNX Runtime engine: a pipeline's three networks as graphs whose weights are the folder's own safetensors.

places.py says where a folder's graphs are, export.py makes them (torch, once), session.py runs them, text.py reads
prompts. Only export.py imports torch, diffusers and transformers, and it is imported only where a graph is missing.
"""
