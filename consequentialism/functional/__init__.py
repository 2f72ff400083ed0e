"""The functional forms of the layers."""
