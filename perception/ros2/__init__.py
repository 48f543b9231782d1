"""ROS 2: messages of predictions, and a node that subscribes to cameras and publishes them."""
