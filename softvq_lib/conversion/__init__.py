"""A trained tokenizer for use elsewhere: as ONNX files, or as a model of diffusers, checked for equal output."""

from softvq_lib.conversion.convert import FORMATS, Exported, export

__all__ = ["FORMATS", "Exported", "export"]
