from dataclasses import dataclass


@dataclass
class GenerationResult:
    text: object
