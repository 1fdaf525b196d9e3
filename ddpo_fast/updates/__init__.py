"""Where an update's gradient comes from: transitions, losses, advantages, the activation cache, score accumulation."""
