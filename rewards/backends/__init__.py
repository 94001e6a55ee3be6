"""What rewards ask: OCR engines, object detectors and vision-language models."""
