from .api import Training as Training
from .api import read_recipe as read_recipe
from .api import train as train
from .recipe import Recipe as Recipe
