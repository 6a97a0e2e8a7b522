use super::*;

fn rule(order: u8, order_z: u8, force_separate_z: Option<bool>) -> Resampling {
    Resampling { order, order_z, force_separate_z }
}

#[test]
fn separate_axis_decisions() {
    let auto = rule(3, 0, None);
    let iso = [1.0, 1.0, 1.0];
    for (current, new, expected) in [
        (iso, iso, None),
        ([5.0, 1.0, 1.0], iso, Some(0)),
        (iso, [1.0, 5.0, 1.0], Some(1)),
        ([1.0, 1.0, 3.5], iso, Some(2)),
        // Strictly more than three times.
        ([3.0, 1.0, 1.0], iso, None),
        ([3.0 + 1e-9, 1.0, 1.0], iso, Some(0)),
        // Two equally coarse axes: none stands apart, and the other spacing is not asked.
        ([0.2, 1.25, 1.25], [9.0, 1.0, 1.0], None),
        // The current spacing has the first word.
        ([5.0, 1.0, 1.0], [1.0, 5.0, 1.0], Some(0)),
        // The coarsest of all, not the one beyond the threshold against its neighbour.
        ([4.0, 3.9, 1.0], iso, Some(0)),
    ] {
        assert_eq!(separate_axis(&auto, current, new), expected, "{current:?} {new:?}");
    }
    assert_eq!(separate_axis(&rule(3, 0, Some(false)), [9.0, 1.0, 1.0], iso), None);
    assert_eq!(separate_axis(&rule(3, 0, Some(true)), [1.1, 1.0, 1.0], iso), Some(0));
    assert_eq!(separate_axis(&rule(3, 0, Some(true)), iso, [9.0, 1.0, 1.0]), None);
}

#[test]
fn new_shape_rounds_halves_to_even_and_refuses_nonsense() {
    assert_eq!(new_shape([5, 7, 9], [1.0; 3], [2.0; 3]).unwrap(), [2, 4, 4]);
    assert_eq!(new_shape([10, 20, 30], [1.5; 3], [1.5; 3]).unwrap(), [10, 20, 30]);
    for (shape, old, message) in [
        ([1, 9, 9], [0.5, 1.5, 1.5], "too thin"),
        ([512, 512, 512], [1e6, 1.0, 1.0], "must be wrong"),
        ([512, 512, 512], [f64::MAX, 1.0, 1.0], "must be wrong"),
        ([9, 9, 9], [0.0, 1.0, 1.0], "positive"),
        ([9, 9, 9], [f64::NAN, 1.0, 1.0], "positive"),
        ([9, 9, 9], [-1.0, 1.0, 1.0], "positive"),
    ] {
        let error = new_shape(shape, old, [1.5; 3]).unwrap_err().to_string();
        assert!(error.contains(message) && !error.contains('\n'), "{error}");
    }
}

#[test]
fn unknown_orders_are_refused() {
    let (array, view) = (vec![0.0; 8], View::whole([2, 2, 2]));
    let mut out = vec![0.0; 27];
    for (rule, apart) in [(rule(2, 0, None), None), (rule(3, 3, None), Some(0))] {
        let error =
            resample(&Held { array: &array, view }, [3, 3, 3], &rule, apart, Isa::detect(), &mut out).unwrap_err();
        assert!(error.to_string().contains("order"), "{error}");
    }
}
