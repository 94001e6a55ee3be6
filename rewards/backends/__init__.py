"""Backends of rewards: OCR engines, object detectors and vision-language models."""
