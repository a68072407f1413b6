"""What is done with a trained net: predict, export, confusion."""
