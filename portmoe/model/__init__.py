"""The MoE decoder: plain modules that know nothing of parallelism."""

from portmoe.model.decoder import Block, Decoder, DecoderOutput, StageOutput
from portmoe.model.init import initialise
from portmoe.model.moe import MoELayer
from portmoe.model.router import Router

__all__ = ["Block", "Decoder", "DecoderOutput", "MoELayer", "Router", "StageOutput", "initialise"]
