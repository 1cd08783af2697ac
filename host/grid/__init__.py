"""One sheet of many pictures: what LCM Grid makes."""
