"""Predicting: a trained network, in whatever form it lies there, asked about images and held against their labels."""

from vitnas.predicting.networks import OnnxNetwork, open_network
from vitnas.predicting.predictor import Prediction, Predictor

__all__ = ["OnnxNetwork", "Prediction", "Predictor", "open_network"]
