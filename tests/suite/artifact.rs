//! The artifact file: it comes back as it went, and nothing else comes back.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use strait::compress::artifact::{Artifact, ArtifactError, BasisSet, Fingerprint, StoredProfile};
use strait::compress::{Basis, FrequencyBasis, KeyBasis, KeyMap, LayerBasis, Projection, RankError, Up};
use strait::kv::layout::{BasisKind, Cskv, Init, Profile, Width, Widths};
use strait::model::config::{ModelConfig, Rope, RopeScaling};

const BASE: Fingerprint = Fingerprint([0xab; 32]);

pub(crate) fn model(layers: usize, heads: usize, kv_heads: usize, head_dim: usize) -> ModelConfig {
    ModelConfig {
        family: "llama".into(),
        hidden: heads * head_dim,
        layers,
        heads,
        kv_heads,
        head_dim,
        intermediate: 64,
        vocab: 100,
        max_positions: 8192,
        norm_eps: 1e-5,
        rope: Rope { theta: 1e4, scaling: RopeScaling::None },
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        qk_norm: false,
        tied: true,
    }
}

pub(crate) fn cskv(name: &str, share: f64, bits: u32, basis: BasisKind) -> Profile {
    Profile { name: name.into(), cskv: Some(Cskv::shares((share, share), bits, (64, 4), basis)) }
}

/// Numbers that differ everywhere.
fn basis(channels: usize, groups: usize, width: usize, seed: f32, trained: bool) -> Basis {
    let numbers = |n: usize, step: f32| (0..n).map(|i| (seed + i as f32 * step).sin()).collect::<Vec<_>>();
    let size = width * channels / groups;
    Basis {
        mean: numbers(channels, 0.3),
        groups,
        directions: numbers(size, 0.7),
        up: if trained { Up::Trained(numbers(size, 0.9)) } else { Up::Directions },
    }
}

pub(crate) fn by_channels(map: &KeyMap) -> &Projection {
    let KeyMap::Channels(projection) = map else { panic!("keys by frequency") };
    projection
}

pub(crate) fn channels_of(basis: &KeyBasis) -> &Basis {
    let KeyBasis::Channels(basis) = basis else { panic!("keys by frequency") };
    basis
}

/// The profile as an artifact has it, whose basis was found somehow.
fn found(mut profile: Profile) -> Profile {
    profile.cskv.as_mut().unwrap().init = Some(Init::Closed);
    profile
}

/// A frequency basis of 3 pairs, and weighted values.
fn by_frequency(layer: usize) -> LayerBasis {
    let numbers = |n: usize, seed: f32| (0..n).map(|i| (seed + layer as f32 + i as f32 * 0.7).sin()).collect::<Vec<_>>();
    let keys =
        FrequencyBasis { kv_heads: 2, half: 2, frequencies: vec![1, 0, 1], directions: numbers(12, 0.1), up: Up::Nested(numbers(12, 0.2)) };
    let values = Basis { mean: numbers(8, 0.3), groups: 1, directions: numbers(32, 0.4), up: Up::Nested(numbers(32, 0.5)) };
    LayerBasis { keys: KeyBasis::Frequencies(keys), values }
}

/// Two layers of 2 KV heads of 4: a joint basis as wide as 6 and 4, one per head, a trained pair, and one by frequency.
fn example() -> (ModelConfig, Artifact) {
    let model = model(2, 4, 2, 4);
    let set = |name: &str, heads: usize, widths: (usize, usize), trained: bool| BasisSet {
        name: name.into(),
        heads_per_group: heads,
        init: Init::Closed,
        layers: (0..2)
            .map(|l| LayerBasis {
                keys: KeyBasis::Channels(basis(8, 2 / heads, widths.0, l as f32, trained)),
                values: basis(8, 2 / heads, widths.1, l as f32 + 0.5, trained),
            })
            .collect(),
    };
    let stored = |profile: Profile, basis: &str, ranks: [(usize, usize); 2]| {
        let own = profile.cskv.as_ref().unwrap().widths(&model).unwrap();
        let one = |(k, v)| Widths { keys: Width { rank: k, ..own.keys }, values: Width { rank: v, ..own.values } };
        StoredProfile { profile: found(profile), basis: basis.into(), widths: ranks.map(one).to_vec() }
    };
    let profiles = vec![
        stored(cskv("half", 0.5, 16, BasisKind::Joint), "joint", [(6, 2), (2, 4)]),
        stored(cskv("half-4", 0.5, 4, BasisKind::Joint), "joint", [(4, 4); 2]),
        stored(cskv("heads", 0.25, 4, BasisKind::Grouped(1)), "heads", [(2, 2); 2]),
        stored(cskv("trained", 0.5, 4, BasisKind::Joint), "qat", [(4, 4); 2]),
        stored(cskv("turning", 0.5, 4, BasisKind::Frequency), "frequency", [(4, 2), (6, 4)]),
    ];
    let frequency =
        BasisSet { name: "frequency".into(), heads_per_group: 2, init: Init::Closed, layers: vec![by_frequency(0), by_frequency(1)] };
    let bases = vec![set("joint", 2, (6, 4), false), set("heads", 1, (4, 4), false), set("qat", 2, (4, 4), true), frequency];
    let artifact = Artifact::new(BASE, &model, bases, profiles).unwrap();
    (model, artifact)
}

#[test]
fn an_artifact_comes_back_from_its_file_as_it_was() {
    let (model, artifact) = example();
    let path = std::env::temp_dir().join(format!("strait-artifact-{}.safetensors", std::process::id()));
    artifact.write(&path).unwrap();
    let back = Artifact::read(&path, &model, BASE).unwrap();
    assert_eq!(back, artifact);
    assert_eq!(std::fs::read(&path).unwrap(), artifact.to_bytes());
    assert_eq!(back.to_bytes(), artifact.to_bytes());
    // Any reader of safetensors sees the tensors under their documented names.
    let bytes = artifact.to_bytes();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("heads.1.values.directions").unwrap().shape(), [2, 2, 4]);
    assert_eq!(file.tensor("frequency.0.keys.directions").unwrap().shape(), [3, 2, 2]);
    assert_eq!(file.len(), 2 * 2 * (2 + 2 + 3) + 2 * (3 + 3));
    std::fs::remove_file(&path).unwrap();
    let gone = Artifact::read(&path, &model, BASE).unwrap_err();
    assert!(matches!(gone, ArtifactError::Read { .. }) && gone.to_string().contains("safetensors"), "{gone}");
    assert!(Artifact::read(std::path::Path::new("/dev/zero"), &model, BASE).is_err(), "an endless file is refused");
    assert!(artifact.write(std::path::Path::new("/nowhere/at/all.safetensors")).is_err());
}

#[test]
fn a_profile_takes_the_leading_directions_of_its_basis() {
    let (_, artifact) = example();
    let layers = artifact.layers(&cskv("half", 0.5, 16, BasisKind::Joint)).unwrap();
    let keys = by_channels(&layers[1].keys);
    let source = channels_of(&artifact.bases()[0].layers[1].keys);
    assert_eq!((keys.rank(), keys.channels(), keys.groups.len()), (2, 8, 1));
    assert_eq!(keys.mean, source.mean);
    assert_eq!(keys.groups[0].up, source.directions[..16]);
    for c in 0..8 {
        for r in 0..2 {
            assert_eq!(keys.groups[0].down[c * 2 + r], source.directions[r * 8 + c]);
        }
    }
    // Groups tile channels and ranks, each from its own block.
    let heads = artifact.layers(&cskv("heads", 0.25, 8, BasisKind::Grouped(1))).unwrap();
    let [a, b] = &heads[0].values.groups[..] else { panic!("two groups") };
    assert_eq!((a.channels.clone(), a.ranks.clone(), b.channels.clone(), b.ranks.clone()), (0..4, 0..1, 4..8, 1..2));
    assert_eq!(b.up, artifact.bases()[1].layers[0].values.directions[8..12]);
    // A trained pair turns back by its own half.
    let trained = artifact.layers(&cskv("trained", 0.5, 4, BasisKind::Joint)).unwrap();
    assert_eq!(by_channels(&trained[0].keys).groups[0].up, artifact.bases()[2].layers[0].keys.up().own().unwrap());
}

#[test]
fn profiles_find_their_ranks() {
    let (_, artifact) = example();
    let joint = BasisKind::Joint;
    let full = Profile { name: "full".into(), cskv: None };
    assert_eq!(artifact.layers(&full).unwrap(), vec![]);
    let cases = [
        (cskv("half", 0.5, 16, joint), vec![(6, 2), (2, 4)], "the stored allocation"),
        (cskv("half", 0.5, 2, joint), vec![(6, 2), (2, 4)], "bits do not matter"),
        (cskv("half", 0.5, 16, BasisKind::Grouped(2)), vec![(6, 2), (2, 4)], "all heads in one group is joint"),
        (cskv("half", 0.25, 16, joint), vec![(2, 2); 2], "other shares: an even allocation"),
        (cskv("mine", 0.5, 16, joint), vec![(4, 4); 2], "an unknown profile"),
        (cskv("trained", 0.5, 8, joint), vec![(4, 4); 2], "trained for other bits: the untrained basis"),
        (cskv("turning", 0.5, 16, BasisKind::Frequency), vec![(4, 2), (6, 4)], "keys by frequency"),
        (cskv("turns", 0.25, 16, BasisKind::Frequency), vec![(2, 2); 2], "keys by frequency, evenly"),
    ];
    for (profile, want, why) in cases {
        let stored = artifact.widths(&profile).unwrap();
        assert_eq!(stored.iter().map(|w| (w.keys.rank, w.values.rank)).collect::<Vec<_>>(), want, "{why}");
        let asked = profile.cskv.as_ref().unwrap().widths(&model(2, 4, 2, 4)).unwrap();
        assert!(stored.iter().all(|w| (w.keys.bits, w.values.bits) == (asked.keys.bits, asked.values.bits)), "{why}");
        let widths: Vec<_> = artifact.layers(&profile).unwrap().iter().map(|l| (l.keys.rank(), l.values.rank())).collect();
        assert_eq!(widths, want, "{why}");
    }
    assert!(
        by_channels(&artifact.layers(&cskv("trained", 0.5, 8, joint)).unwrap()[0].keys).groups[0].up
            != artifact.bases()[2].layers[0].keys.up().own().unwrap()
    );
    let refused = [
        (
            cskv("wide", 1.0, 16, joint),
            "the profile wide cannot be served by this artifact: keys of layer 0: rank 8 is asked of a basis of width 6",
        ),
        (cskv("odd", 0.5, 16, BasisKind::Grouped(3)), "the profile odd is not usable: groups of 3 do not divide 2 KV heads"),
        (cskv("none", 0.5, 5, joint), "the profile none is not usable: bits is 5 and must be 16, 8, 4, 3 or 2"),
        (cskv("nan", f64::NAN, 16, joint), "the profile nan is not usable: key_rank is NaN and must be above 0 and at most 1"),
    ];
    for (profile, message) in refused {
        assert_eq!(artifact.layers(&profile).unwrap_err().to_string(), message);
    }
    let set = artifact.bases()[2].clone();
    let trained = Artifact::new(BASE, &model(2, 4, 2, 4), vec![set.clone()], vec![]).unwrap();
    let message = trained.layers(&cskv("a", 0.5, 4, joint)).unwrap_err().to_string();
    assert_eq!(
        message,
        "the compression artifact has no basis of 2 heads per group for the profile a; it has: qat (2 heads per group, closed, trained); make it anew with `strait compress --config`, of the file that defines the profile"
    );
    assert_eq!(set.layers[0].keys.check_rank(2), Err(RankError::Trained { rank: 2, width: 4 }));
}

#[test]
fn a_profile_that_differs_in_bits_costs_no_tensor() {
    let (model, artifact) = example();
    let one = Artifact::new(BASE, &model, artifact.bases()[..1].to_vec(), artifact.profiles()[..1].to_vec()).unwrap();
    let two = Artifact::new(BASE, &model, artifact.bases()[..1].to_vec(), artifact.profiles()[..2].to_vec()).unwrap();
    let data = |a: &Artifact| {
        let bytes = a.to_bytes();
        bytes.len() - 8 - u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
    };
    assert_eq!(data(&one), data(&two));
    assert_eq!(data(&one), 2 * 4 * (8 + 6 * 8 + 8 + 4 * 8));
}

#[test]
fn a_file_cut_at_any_byte_is_refused() {
    let (model, artifact) = example();
    let bytes = artifact.to_bytes();
    for n in 0..bytes.len() {
        assert!(Artifact::from_bytes(&bytes[..n], &model, BASE).is_err(), "the first {n} bytes");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(Artifact::from_bytes(&longer, &model, BASE).is_err());
}

#[test]
fn no_flipped_bit_changes_what_is_read() {
    let (model, artifact) = example();
    let bytes = artifact.to_bytes();
    for at in 0..bytes.len() {
        for bit in [0, 1, 4, 7] {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            if let Ok(read) = Artifact::from_bytes(&flipped, &model, BASE) {
                assert_eq!(read, artifact, "byte {at}, bit {bit}");
            }
        }
    }
}

/// A file with its own digest, whose manifest and tensors were changed by `edit`.
fn forge(edit: impl FnOnce(&mut Value, &mut HashMap<String, (Dtype, Vec<usize>, Vec<u8>)>)) -> Vec<u8> {
    let bytes = example().1.to_bytes();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let mut manifest: Value = serde_json::from_str(&header.metadata().as_ref().unwrap()["strait.manifest"]).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = file.iter().map(|(n, v)| (n.to_owned(), (v.dtype(), v.shape().to_vec(), v.data().to_vec()))).collect();
    edit(&mut manifest, &mut tensors);
    let manifest = if manifest.is_string() { manifest.as_str().unwrap().to_owned() } else { manifest.to_string() };
    let views: Vec<_> = tensors.iter().map(|(n, (d, s, b))| (n.clone(), TensorView::new(*d, s.clone(), b).unwrap())).collect();
    let write = |digest: &str| {
        let metadata = HashMap::from([("strait.manifest".into(), manifest.clone()), ("strait.blake3".into(), digest.to_owned())]);
        safetensors::serialize(views.iter().map(|(n, v)| (n.clone(), v)), Some(metadata)).unwrap()
    };
    // The digest has a fixed width, so the data lie where they will.
    let draft = write(&"0".repeat(64));
    let header = u64::from_le_bytes(draft[..8].try_into().unwrap()) as usize;
    let digest = blake3::Hasher::new().update(manifest.as_bytes()).update(&draft[8 + header..]).finalize();
    write(digest.to_hex().as_str())
}

#[test]
fn what_does_not_hold_together_is_refused_in_one_sentence() {
    let (model, artifact) = example();
    assert_eq!(Artifact::from_bytes(&forge(|_, _| {}), &model, BASE).unwrap(), artifact, "the forge itself makes sound files");
    type Edit = fn(&mut Value, &mut HashMap<String, (Dtype, Vec<usize>, Vec<u8>)>);
    let cases: [(Edit, &str); 26] = [
        (
            |m, _| m["version"] = json!(1),
            "the compression artifact has format version 1 and this build reads version 3; make it anew with `strait compress`",
        ),
        (
            |m, _| m["format"] = json!("x"),
            "the manifest of the compression artifact is not what this version reads: its format is \"x\", not \"strait-compression\"",
        ),
        (|m, _| *m = json!("[1"), "the manifest of the compression artifact is not what this version reads: "),
        (|m, _| m["extra"] = json!(1), "the manifest of the compression artifact is not what this version reads: unknown field `extra`"),
        (
            |m, _| m["base"] = json!("12"),
            "the manifest of the compression artifact is not what this version reads: \"12\" is not a fingerprint of 64 hex digits",
        ),
        (|m, _| m["layers"] = json!(3), "the compression artifact is for layers 3 and the model has 2"),
        (
            |m, _| m["head_dim"] = json!(1_u64 << 60),
            "the compression artifact is for head dimension 1152921504606846976 and the model has 4",
        ),
        (|m, _| m["bases"][0]["heads_per_group"] = json!(0), "the basis joint is not usable: no KV head is in a group"),
        (
            |m, _| m["bases"][0]["widths"][1][0] = json!(9),
            "the basis joint is not usable: keys of layer 1: a width of 9 exceeds 8 channels",
        ),
        (
            |m, _| m["bases"][1]["widths"][0][1] = json!(3),
            "the basis heads is not usable: values of layer 0: a width of 3 does not divide into 2 groups",
        ),
        (
            |m, _| m["bases"][0]["widths"][0][0] = json!(5),
            "the tensor joint.0.keys.directions is F32 [1, 6, 8] and its manifest says F32 [1, 5, 8]",
        ),
        (
            |_, t| t.get_mut("frequency.1.keys.frequencies").unwrap().2[..4].copy_from_slice(&0.5f32.to_le_bytes()),
            "the basis frequency is not usable: keys of layer 1: 0.5 is no frequency of heads of 4",
        ),
        (
            |_, t| t.get_mut("frequency.0.keys.frequencies").unwrap().2[4..8].copy_from_slice(&2f32.to_le_bytes()),
            "the basis frequency is not usable: keys of layer 0: 2 is no frequency of heads of 4",
        ),
        (|m, _| m["bases"][3]["widths"][0][0] = json!(5), "the basis frequency is not usable: keys of layer 0: no pairs make a width of 5"),
        (|m, _| m["bases"][0]["widths"] = json!([]), "the basis joint is not usable: it has widths for 0 of 2 layers"),
        (
            |m, _| m["profiles"][0]["layers"][0]["keys"]["rank"] = json!(7),
            "the profile half cannot be served by this artifact: keys of layer 0: rank 7 is asked of a basis of width 6",
        ),
        (
            |m, _| m["profiles"][2]["layers"][1]["values"]["rank"] = json!(3),
            "the profile heads cannot be served by this artifact: values of layer 1: rank 3 does not divide into 2 groups",
        ),
        (|m, _| m["profiles"][0]["basis"] = json!("gone"), "the profile half is not usable: it reads the basis gone, which is not there"),
        (|m, _| m["profiles"][1]["name"] = json!("half"), "the profile half is not usable: two profiles have this name"),
        (|m, _| m["profiles"][1]["sinks"] = json!(65), "the profile half-4 is not usable: sinks is 65 and must be at most 64, one page"),
        (|m, _| m["profiles"][1]["window"] = json!(65537), "the profile half-4 is not usable: window is 65537 and must be at most 65536"),
        (|m, _| m["profiles"][1]["name"] = json!("full"), "the profile full is not usable: full is the exact cache"),
        (
            |m, _| m["profiles"][1]["name"] = json!("a b"),
            "the profile a b is not usable: a name is 1 to 64 letters, digits, '-', '_' or '.'",
        ),
        (|_, t| drop(t.remove("qat.1.keys.up")), "the compression artifact lacks the tensor qat.1.keys.up"),
        (
            |_, t| drop(t.insert("more".into(), (Dtype::U8, vec![4], vec![0; 4]))),
            "the compression artifact has a tensor more that its manifest does not know",
        ),
        (
            |_, t| t.get_mut("heads.1.values.mean").unwrap().2[12..16].copy_from_slice(&f32::NAN.to_le_bytes()),
            "the tensor heads.1.values.mean has a value that is not finite at element 3",
        ),
    ];
    for (edit, message) in cases {
        let refused = Artifact::from_bytes(&forge(edit), &model, BASE).unwrap_err().to_string();
        assert!(refused.starts_with(message) && !refused.contains('\n'), "{refused}\nwanted: {message}");
    }
}

/// A checkpoint, named by mistake, may be larger than memory: what is no artifact of this base is refused by its header alone.
#[test]
fn what_is_no_artifact_of_this_base_is_not_read_to_its_end() {
    let (model, artifact) = example();
    let path = std::env::temp_dir().join(format!("strait-large-{}.safetensors", std::process::id()));
    let refused = |header: &[u8], base| {
        std::fs::write(&path, header).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
        Artifact::read(&path, &model, base).unwrap_err()
    };
    let checkpoint = br#"{"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}"#;
    let plain = [&(checkpoint.len() as u64).to_le_bytes(), &checkpoint[..]].concat();
    let other = refused(&plain, BASE);
    assert!(matches!(other, ArtifactError::NoManifest("strait.manifest")), "{other}");
    let foreign = refused(&artifact.to_bytes(), Fingerprint([1; 32]));
    assert!(matches!(foreign, ArtifactError::WrongBase { .. }), "{foreign}");
    for wrong in [&b"GGUF\x03\0\0\0\x01\0\0\0"[..], &[9, 0, 0, 0, 0, 0, 0, 0, b'x'], &[1]] {
        let other = refused(wrong, BASE);
        assert!(matches!(other, ArtifactError::Container(_)), "{other}");
    }
    std::fs::remove_file(&path).unwrap();
}

/// As root, the name of a device can be taken from it.
#[test]
fn only_a_regular_file_is_replaced() {
    let (_, artifact) = example();
    let folder = std::env::temp_dir().join(format!("strait-places-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let (socket, link) = (folder.join("socket"), folder.join("link"));
    let _bound = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    std::os::unix::fs::symlink(&socket, &link).unwrap();
    for (path, why) in [(&socket, "not a regular file"), (&link, "not a regular file"), (&folder, "not a regular file")] {
        for refused in [Artifact::check_place(path), artifact.write(path)] {
            let said = refused.unwrap_err().to_string();
            assert!(said.contains(why) && said.contains("unchanged"), "{said}");
        }
    }
    let said = Artifact::check_place(&folder.join("none/a")).unwrap_err().to_string();
    assert!(said.contains("No such file"), "{said}");
    for good in [folder.join("a"), folder.join("a")] {
        Artifact::check_place(&good).unwrap();
        artifact.write(&good).unwrap();
    }
    // One that was cut short, or was never written, is made anew; weights that were named by mistake stay.
    let there = folder.join("a");
    for (bytes, may) in
        [(&artifact.to_bytes()[..200], true), (b"".as_slice(), true), (&b"@\0\0\0\0\0\0\0{\"model.norm.weight\":{"[..], false)]
    {
        std::fs::write(&there, bytes).unwrap();
        let said = Artifact::check_place(&there).map_err(|e| e.to_string());
        assert_eq!(said.is_ok(), may, "{said:?}");
        assert!(may || said.unwrap_err().ends_with("/a is there and is no compression artifact; remove it, or name another file"));
        assert_eq!(std::fs::read(&there).unwrap(), bytes);
    }
    let mut left: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["a", "link", "socket"], "what is only tried leaves nothing");
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn an_artifact_of_another_base_is_refused_by_both_names() {
    let (model, artifact) = example();
    let other = Fingerprint([0x01; 32]);
    let refused = Artifact::from_bytes(&artifact.to_bytes(), &model, other).unwrap_err();
    assert!(matches!(refused, ArtifactError::WrongBase { artifact: BASE, model } if model == other));
    let message = refused.to_string();
    assert!(message.contains(&"ab".repeat(32)) && message.contains(&"01".repeat(32)), "{message}");
    // Another model as well as another base: the base is what the operator can mend.
    let wider = self::model(3, 4, 2, 8);
    assert!(matches!(Artifact::from_bytes(&artifact.to_bytes(), &wider, other).unwrap_err(), ArtifactError::WrongBase { .. }));
    assert!(matches!(Artifact::from_bytes(&artifact.to_bytes(), &wider, BASE).unwrap_err(), ArtifactError::Geometry { .. }));
}

#[test]
fn keys_by_frequency_take_leading_pairs_and_conjugates() {
    let (_, artifact) = example();
    let layers = artifact.layers(&cskv("turning", 0.5, 4, BasisKind::Frequency)).unwrap();
    let (KeyMap::Frequencies(map), KeyBasis::Frequencies(source)) = (&layers[0].keys, &artifact.bases()[3].layers[0].keys) else {
        panic!("keys by frequency")
    };
    assert_eq!((map.frequencies.as_slice(), map.kv_heads, map.half), (&[1, 0][..], 2, 2));
    for (i, (&[re, im], &[up_re, up_im])) in map.down.iter().zip(&map.up).enumerate() {
        assert_eq!((re, -im), (source.directions[2 * i], source.directions[2 * i + 1]));
        let up = source.up.own().unwrap();
        assert_eq!((up_re, up_im), (up[2 * i], up[2 * i + 1]));
    }
    assert_eq!(map.down.len(), 4);
    assert_eq!(source.frequencies.len(), 3);
    assert_eq!(artifact.bases()[3].layers[0].keys.check_rank(3), Err(RankError::Odd { rank: 3 }));
    assert_eq!(artifact.bases()[3].layers[0].keys.check_rank(8), Err(RankError::TooWide { rank: 8, width: 6 }));
}
