from mtl_jax.layers.heads import Classification
from mtl_jax.tasks import Task, accuracy, softmax_cross_entropy


def test_the_target_is_the_field_of_the_task_s_name_unless_it_says_otherwise():
    head = Classification(num_classes=2)
    same = Task("digit", head, softmax_cross_entropy, (accuracy(),))
    other = Task("parity", head, softmax_cross_entropy, (accuracy(),), target="digit")
    assert same.field == other.field == "digit"
