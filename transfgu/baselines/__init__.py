"""The methods that TransFGU is compared with."""
