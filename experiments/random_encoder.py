"""Write EfficientNet-Lite0 with untrained weights, for an ablation: python -m experiments.random_encoder PATH"""

import sys

import torch

from experiments.plan import ENCODER
from models.encoder_table import encoder_spec
from models.encoders import Encoder

if __name__ == "__main__":
    torch.manual_seed(0)
    torch.save(Encoder(encoder_spec(ENCODER), grid=8).network.state_dict(), sys.argv[1])
