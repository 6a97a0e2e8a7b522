//! What holds of gradients beside their values.

use super::*;

/// A normalised source gives what its normalised values give.
#[test]
fn normalised_while_read() {
    let mut p = cube((20, None), 24, [8, 6, 9], 1);
    for precision in [Precision::F32, Precision::Bf16] {
        p.precision = precision;
        let positions = p.positions();
        for device in devices() {
            let dims = p.layer().x;
            let (one, b) = (values(20, 31), values(20, 32));
            let [one, b] = [&one, &b].map(|v| testing::vector(v, &device).unwrap());
            let identity: Vec<f32> = (0..400).map(|i| if i % 21 == 0 { 1.0 } else { 0.0 }).collect();
            let identity = testing::filter(&identity, [20, 20, 1, 1, 1], &device).unwrap();
            let mut cx = Ctx::infer(&device);
            let x = activation(&mut cx, &p.x(), dims, true);
            let pointwise = Conv3d { stride: [1; 3], padding: [0; 3] };
            let (x, moments) = ops::conv3d_measured(&mut cx, x, &identity, None, pointwise).unwrap();
            let x = cx.leaf(testing::stored(x.into_value(), precision).unwrap());
            let norm = InstanceNorm { eps: 1e-5, slope: Some(0.01) };
            let norm = Arc::new(Affine::new(&moments, &one, &b, norm).unwrap());
            let lazy = Source::normalised(x.clone(), norm.clone());
            let floats = activation(&mut cx, &x.value().to_host().unwrap(), dims, true);
            let made = Source::normalised(floats, norm).into_var(&mut cx).unwrap();
            let dy = p.tensor(&device, &p.dy(), p.dy_dims());
            let scale = largest(&made.value().to_host().unwrap()) * largest(&p.dy());
            for name in p.wgrad_names(&device) {
                let by = By { name: Some(name), strict: false };
                let got = grad::wgrad(by, lazy.clone().into(), p.layer().w, p.how, &dy, None).unwrap().0;
                let expected = grad::wgrad(by, made.clone().into(), p.layer().w, p.how, &dy, None).unwrap().0;
                for (g, e) in got.to_host().unwrap().iter().zip(&expected.to_host().unwrap()) {
                    // The two read values that differ by roundings.
                    assert!(f64::from((g - e).abs()) <= gamma(8) * positions as f64 * scale, "{name}: {g} {e}");
                }
            }
        }
    }
}

#[test]
fn bias_is_a_sum() {
    let p = cube((1, None), 37, [5, 60, 61], 1);
    let (dy, space) = (p.dy(), p.output().iter().product::<usize>());
    let mut expected = vec![Sum::default(); 37];
    for (i, v) in dy.iter().enumerate() {
        expected[i / space % 37].add(f64::from(*v));
    }
    for [one, two, seven] in threaded_devices() {
        let run = |device: &Device, into: Option<Tensor>| {
            let db = grad::bias_grad(&p.tensor(device, &dy, p.dy_dims()), into).unwrap();
            db.to_host().unwrap()
        };
        let db = run(&one, None);
        assert!(db[37..].iter().all(|v| *v == 0.0));
        // 64 values in a row, four sums, and the rest in f64.
        let bound = |s: &Sum| Bounded { value: s.value, error: gamma(68) * s.absolute };
        check("bias", &db[..37], &expected.iter().map(bound).collect::<Vec<_>>());
        assert!(bits(&db) == bits(&run(&two, None)) && bits(&db) == bits(&run(&seven, None)));
        let into = ops::pack_vector(&[1.0; 37], &one).unwrap();
        let sum = run(&one, Some(into));
        assert!(sum.iter().zip(&db).all(|(s, d)| *s == d + 1.0 || *d == 0.0));
    }
}

/// The same bytes for any number of threads.
#[test]
fn threads_change_nothing() {
    for p in [
        cube((16, Some(20)), 24, [9, 10, 33], 1),
        Problem { factor: [2; 3], precision: Precision::Bf16, ..cube((16, None), 48, [8, 10, 12], 1) },
        cube((16, None), 40, [9, 8, 21], 2),
        Problem { blocked: false, ..cube((1, None), 16, [12, 14, 40], 1) },
        cube((40, None), 40, [2, 2, 2], 1),
    ] {
        for [one, two, seven] in threaded_devices() {
            for name in p.dgrad_names(&one, false) {
                let run = |device| bits(&p.dgrad(device, Some(name), false, None).to_host().unwrap());
                let first = run(&one);
                assert!(first == run(&two) && first == run(&seven), "{name} {p:?}");
            }
            for name in p.wgrad_names(&one) {
                let run = |device| bits(&p.wgrad(device, Some(name), None).to_host().unwrap());
                let first = run(&one);
                assert!(first == run(&two) && first == run(&seven), "{name} {p:?}");
            }
        }
    }
}

#[test]
fn bad_sizes_are_errors() {
    let device = Device::cpu();
    let p = cube((16, None), 16, [4, 4, 4], 1);
    let w = testing::filter(&p.w(), p.layer().w, &device).unwrap();
    let dy = p.tensor(&device, &p.dy(), p.dy_dims());
    let by = By::default();
    let other = Layer { x: [2, 16, 4, 4, 5], ..p.layer() };
    for (layer, channels, factor) in
        [(other, 0..16, [1; 3]), (p.layer(), 0..17, [1; 3]), (p.layer(), 3..3, [1; 3]), (p.layer(), 0..16, [3, 1, 1])]
    {
        let e = grad::dgrad(by, layer, &dy, &w, channels, factor, None).unwrap_err().to_string();
        assert!(e.starts_with("conv3d_grad: ") && !e.contains('\n'), "{e}");
    }
    let mut cx = Ctx::infer(&device);
    let x = p.read(&mut cx);
    assert!(grad::wgrad(by, x.clone(), [17, 16, 3, 3, 3], p.how, &dy, None).is_err());
    let into = Some(ops::pack_vector(&[0.0; 16], &device).unwrap());
    assert!(grad::wgrad(by, x, p.layer().w, p.how, &dy, into).is_err());
}
