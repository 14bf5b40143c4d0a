"""No secret of a broad corpus survives, and what only looks like one stays as it is."""

from __future__ import annotations

import json
import math
import random
import re
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainbus import redaction
from trainbus.events import (
    EVENT_TYPES,
    AlertRaised,
    ArtifactLogged,
    Best,
    CheckpointSaved,
    ConfusionMatrixLogged,
    ConsoleLogged,
    CurveLogged,
    EnvironmentDescribed,
    EpochEnded,
    EpochStarted,
    Failure,
    GitState,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    Record,
    Resumed,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
    UnknownEvent,
    decode,
    encode,
)
from trainbus.journal.blobs import Blobs
from trainbus.journal.directory import RunFolder
from trainbus.redaction import REDACTED, patterns

ALPHABETS = {
    "a": string.ascii_letters + string.digits,
    "b": string.ascii_letters + string.digits + "+/",
    "d": string.digits,
    "h": "0123456789abcdef",
    "l": string.ascii_lowercase + string.digits,
    "u": string.ascii_uppercase + "234567",
    "w": string.ascii_letters + string.digits + "_-",
}


def made(shape: str) -> str:
    """Return what a shape stands for: `{a12}` is 12 random letters and digits, `{}` is nothing.

    So no secret stands in this file, not even a made-up one, and no scanner stumbles over it.
    """
    chance = random.Random(shape)

    def some(found: re.Match[str]) -> str:
        alphabet = ALPHABETS[found[1]] if found[1] else ""
        return "".join(chance.choice(alphabet) for _ in range(int(found[2] or 0)))

    return re.sub(r"\{([abdhluw]?)(\d*)\}", some, shape)


def split(line: str) -> tuple[str, list[str]]:
    """Return the text of a line (⏎ is a line break), and its secrets, which are between « »."""
    whole = made(line.replace("⏎", "\n"))
    return re.sub("[«»]", "", whole), re.findall("«([^»]*)»", whole)


def lines(corpus: str) -> list[str]:
    return [line for line in corpus.strip("\n").split("\n") if line]


# A name, and the secret under it.
NAMED = """
password hunter2
Password Tr0ub4dor&3
PASSWORD correct horse battery staple
db_password letmein
dbPassword s3cr3t!
DB_PASS swordfish
MYSQL_ROOT_PASSWORD root
POSTGRES_PASSWORD {a16}
PGPASSWORD {a12}
MYSQL_PWD abc
redis.passwd {a10}
smtp-password {a16}
mail/smtp/pass {a9}
email_pass {a9}
passphrase open sesame
ssh_passphrase sesame street
passcode 4711x
user_password1 qwertz
password_2 asdfgh
old_password abcdef
new_password ghijkl
passwordConfirm mnopqr
password_hash $2b$12${a53}
passwordHash {b43}=
password_base64 aHVudGVyMg==
mlflow_tracking_password monkey
keystorePassword changeit
admin_passwd letmein
zugang.kennwort geheim
secret sauce
secrets [shh]
client_secret {a40}
clientSecret {w32}
OAUTH_CLIENT_SECRET {}GOCSPX-{w28}
jwt_secret my-jwt-signing-phrase
SECRET_KEY django-insecure-{w50}
secret_key_base {h128}
app_secret {h32}
webhook_secret {a24}
s3.secret {b40}
aws_secret_access_key {b40}
awsSecretAccessKey {b40}
AWS_SECRET_ACCESS_KEY {b40}
aws_access_key_id {u20}
accessKeyId {u20}
AWS_SESSION_TOKEN {b200}
minio_access_key minioadmin
MINIO_SECRET_KEY minioadmin
clearml_api_access_key {u20}
CLEARML_API_SECRET_KEY {a50}
api_key abc
apikey {h32}
apiKey {a32}
API-KEY {a32}
x-api-key {l40}
X-Api-Key {l40}
openai_api_key {}sk-{a48}
OPENAI_API_KEY {}sk-proj-{w80}
OPENAI_API_KEY_DEV {a30}
anthropicApiKey {}sk-ant-api03-{w90}
wandb_api_key {h40}
WANDB_API_KEY {h40}
wandb.key {h40}
WANDB_KEY {}wandb_v1_{a77}
wandb.api_key local-{h40}
comet_api_key {a25}
COMET_API_KEY {a25}
neptune_api_token {b120}==
NEPTUNE_API_TOKEN {b120}==
roboflow_api_key {a20}
ultralytics_api_key {h42}
ULTRALYTICS_API_KEY {h42}
kaggle_key {h32}
KAGGLE_KEY {h32}
DAGSHUB_USER_TOKEN {h40}
dagshub.token {h40}
LIGHTNING_API_KEY {h8}-{h4}-{h4}-{h4}-{h12}
hf_token {}hf_{a34}
HF_TOKEN {}hf_{a34}
HUGGING_FACE_HUB_TOKEN {a34}
hub_token {a37}
huggingface.token {a37}
hftoken {a37}
token {a20}
Token {a20}
auth_token {a20}
authToken {a20}
access_token {w40}
accessToken {w40}
refresh_token {w64}
id_token {w64}
bot_token {d9}:{w35}
SLACK_BOT_TOKEN {}xoxb-{d12}-{d13}-{a24}
github_token {}ghp_{a36}
GITHUB_TOKEN {}ghs_{a36}
GH_TOKEN {h40}
CI_JOB_TOKEN {w20}
gitlab.private_token {w20}
personal_access_token {a52}
GITHUB_PAT {a40}
azure_devops_pat {l52}
csrf_token {a32}
token_value {a32}
token_1 {a24}
api_token_prod {a24}
sas_token sv=2022-11-02&ss=b&sig={a43}%3D
auth me:hunter2
basic_auth user:pass
http_auth {b24}
authorization Basic {b24}==
Authorization Bearer {a30}
proxy-authorization {b24}
bearer {a30}
cookie sessionid={l32}
Cookies a=b; c=d
session_cookie {a32}
set-cookie sid={a32}; HttpOnly
credentials {a32}
gcp_credential {a32}
creds me/secret
connection_string Server=db;Database=runs;Uid=me;Pwd=hunter2
connectionString DefaultEndpointsProtocol=https;AccountName=x;AccountKey={b86}==
AZURE_STORAGE_CONNECTION_STRING AccountName=x;AccountKey={b86}==
conn_str host=db user=me password=hunter2
private_key {b64}
privateKey {b64}
ssh_private_key {b64}
ssh_key {b68}
signing_key {b44}
encryption_key {b44}
ENCRYPTION_KEY_V2 {b44}
fernet_key {b43}=
license_key {u5}-{u5}-{u5}-{u5}
licenseKey {u25}
account_key {b86}==
storage_account_key {b86}==
AZURE_STORAGE_KEY {b86}==
master_key {h64}
service_key {a40}
service_account_key {a40}
subscription-key {h32}
deploy_key {b44}
hmac_key {h64}
azure_openai_key {h32}
seed_phrase legal winner thank year wave sausage worth useful legal winner
mnemonic legal winner thank year wave sausage worth useful legal winner
recovery_codes {l5}-{l5}
password_for_db swordfish
api_keys {a32}
userPasswords hunter2
my.api.key {a24}
OPENAI_APIKEY {a24}
apikey_openai {a24}
awsSecretKey {b40}
R2_SECRET_ACCESS_KEY {b40}
AWSSecretKey {b40}
wasabi_secret {b40}
VAULT_SECRET_ID {a32}
hfAccessToken {a34}
HF_TOKEN_READ {a34}
push_to_hub_token {a34}
OAuthToken {w40}
GitHubToken {a36}
telegram_bot_token {a40}
SLACK_SIGNING_SECRET {h32}
twilio_auth_token {h32}
ansible_become_pass letmein
keystore_pass changeit
userpass hunter2
rootpw hunter2
ldap_bind_password hunter2
gmail_app_password {l4} {l4} {l4} {l4}
snowflake_password hunter2
rabbitmq_pass guest1
docker_auth {b24}
registry_credentials me:hunter2
REDIS_AUTH hunter2
databricks_pat {a40}
datadog_app_key {h40}
newrelic_license_key {h40}
consumer_key {a25}
cookie_secret {b44}
jwt_signing_key {b44}
private_key_pem {b64}
ssh_private_key_content {b64}
private_key_id {h40}
auth_header Bearer {a30}
sharedAccessSignature {a43}
mnemonic_phrase legal winner thank year
motdepasse soleil
label_studio_api_key {h40}
langfuse_secret_key {a36}
roboflow_key {a20}
modal_token_secret {a22}
volc_secret_key {b60}
slack_webhook https://hooks.example.com/services/{u9}/{u11}/{a24}
"""

# A text, with the secrets in it.
TEXTS = r"""
OPENAI key is «{}sk-{a48}».
using «{}sk-proj-{w80}A» for the judge
«{}sk-ant-api03-{w93}AA»
sk: «{}sk-or-v1-{h64}», router
id «{}AKIA{u16}» of the bucket
session («{}ASIA{u16}»)
remote: «{}ghp_{a36}» expired
«{}gho_{a36}» «{}ghu_{a36}» «{}ghs_{a36}» «{}ghr_{a36}»
«{}github_pat_{a22}_{a59}»
cloned with «{}glpat-{w20}»
download with «{}hf_{a34}» failed
slack «{}xoxb-{d12}-{d13}-{a24}»
slack «{}xoxp-{d12}-{d12}-{d12}-{h32}»
slack «{}xapp-1-{u11}-{d13}-{h64}»
posted to https://hooks.slack.com/services/«T{u8}/B{u8}/{a24}»
posted to https://discord.com/api/webhooks/«{d18}/{w68}»
posted to https://discordapp.com/api/webhooks/«{d18}/{w68}» twice
see https://example.webhook.office.com/webhookb2/«{h8}-{h4}-{h4}/IncomingWebhook/{h32}»
maps «{}AIza{w35}»
google «{}ya29.{w60}»
«{}eyJ{a20}.eyJ{a60}.{w43}»
Header was Bearer «{}eyJ{a20}.{}eyJ{a60}.{w43}»
neptune «{}eyJhcGlfYWRkcmVzcyI6{b100}==»
«{}npm_{a36}» in .npmrc
//registry.npmjs.org/:_authToken=«{}npm_{a36}»
twine: «{}pypi-AgEIcHlwaS5vcmc{w80}»
mail «{}SG.{w22}.{w43}»
stripe «{}sk_live_{a24}» and «{}rk_live_{a24}» and «{}sk_test_{a24}»
twilio «{}SK{h32}»
telegram «{d9}:AA{w33}»
digitalocean «{}dop_v1_{h64}»
databricks «{}dapi{h32}»
groq «{}gsk_{a52}», nvidia «{}nvapi-{w64}»
vault «{}hvs.{w90}»
docker «{}dckr_pat_{w27}»
replicate «{}r8_{a37}», langsmith «{}lsv2_pt_{h32}_{h10}»
wandb «{}wandb_v1_{a77}»
blob ?sv=2022-11-02&se=2025-01-01&sr=b&sp=r&sig=«{a40}%3D»
https://bucket.s3.amazonaws.com/x.pt?X-Amz-Expires=60&X-Amz-Signature=«{h64}»
https://storage.googleapis.com/b/x?X-Goog-Signature=«{h200}»&X-Goog-Expires=1
DefaultEndpointsProtocol=https;AccountName=runs;AccountKey=«{b86}==»;EndpointSuffix=core.windows.net
Endpoint=sb://x.servicebus.windows.net/;SharedAccessKeyName=root;SharedAccessKey=«{b43}=»
Server=tcp:db,1433;User ID=me;Password=«p4ss,w0rd!»;Encrypt=True
postgres://me:«hunter2»@db:5432/optuna
postgresql+psycopg2://me:«hun%40ter2»@db/optuna?sslmode=require
mysql://root:«p@ss»@127.0.0.1/x
redis://:«{a20}»@cache:6379/0
mongodb+srv://me:«{a16}»@cluster0.mongodb.net/?retryWrites=true
amqp://guest:«guest1»@mq//
http://me:«hunter2»@proxy:3128
pip install --extra-index-url https://__token__:«{a40}»@pypi.example.com/simple
git clone https://«{a40}»@github.com/me/repo.git
git clone https://oauth2:«{w20}»@gitlab.com/me/repo.git
git clone https://«{h40}»:x-oauth-basic@github.com/me/repo
sentry https://«{h32}»@o1.ingest.sentry.io/2
-----BEGIN RSA PRIV{}ATE KEY-----⏎«{b64}⏎{b64}⏎{b30}==»⏎-----END RSA PRIV{}ATE KEY-----
-----BEGIN PRIV{}ATE KEY-----\n«{b64}\n{b64}»\n-----END PRIV{}ATE KEY-----\n
-----BEGIN OPENSSH PRIV{}ATE KEY-----⏎«{b70}⏎{b70}»
-----BEGIN EC PRIV{}ATE KEY-----⏎Proc-Type: 4,ENCRYPTED⏎⏎«{b64}⏎{b64}»
-----BEGIN PGP PRIV{}ATE KEY BLOCK-----⏎⏎«{b64}⏎=abcd»⏎-----END PGP PRIV{}ATE KEY BLOCK-----
Authorization: Bearer «{a32}»
authorization: bearer «mysecretbearertoken»
Authorization: Basic «dXNlcjpodW50ZXIy»
-H 'Authorization: token «{h40}»' https://api.example.com
{'Authorization': 'Bearer «{w40}»', 'Accept': '*/*'}
sent Basic «bWU6aHVudGVyMg==» to the proxy
X-Api-Key: «{l40}»
PRIVATE-TOKEN: «{w20}»
Cookie: «sessionid={l32}; csrftoken={l32}»
Set-Cookie: «sid={l32}»; Path=/
GET /v1/models?token=«{a24}»&limit=5
GET /v1/models?limit=5&api_key=«abc123»
GET /v1?key=«{a32}»&x=1
GET /cb?code=«{w40}»&state=1
GET /login?user=me&pass=«hunter2»
https://x.example.com/?access_token=«{w30}»#top
password=«hunter2»
password = «hunter2»
password: «hunter2»
Password:«hunter2»
the password is «hunter2», don't tell
login failed for me with password '«hunter2»'
login failed: password="«correct horse»"
user: me, password: «letmein», host: db
{"user": "me", "password": "«letmein»", "port": 1}
{'api_key': '«abc»', 'lr': 0.1}
{\"api_key\": \"«{a20}»\", \"lr\": 0.1}
"{\\"token\\": \\"«{a20}»\\"}"
Namespace(lr=0.1, password='«hunter2»', data='coco.yaml')
Config(api_key='«abc»', author='Jane')
train.py --data coco.yaml --api-key «abc» --epochs 3
train.py --password=«abc» --epochs 3
train.py --password «hunter2»
train.py --hf-token «{}hf_{a34}» --token-type x
train.py --wandb_key «{h40}»
python -m train +wandb.api_key=«{h40}» optimizer=sgd
API_KEY: "«abc»"
api_key = '«abc»'
export WANDB_API_KEY=«{h40}»
export  HF_TOKEN="«{a30}»"
set COMET_API_KEY=«{a25}»
$env:OPENAI_API_KEY = "«{a30}»"
docker run -e WANDB_API_KEY=«{h40}» -e LR=0.1 image
WANDB_API_KEY=«{h40}» python train.py
os.environ["WANDB_API_KEY"] = "«{h40}»"
os.environ['NEPTUNE_API_TOKEN'] = '«{b60}=='»
wandb.login(key="«{h40}»")
wandb.login(relogin=True, key='«{h40}»')
wandb login «{h40}»
wandb login --relogin «{h40}»
huggingface-cli login --token «{a34}»
machine api.wandb.ai login user password «{h40}»
machine api.wandb.ai⏎  login user⏎  password «{h40}»
docker login -u me -p «hunter2» ghcr.io
sshpass -p «hunter2» ssh me@host
curl -u me:«hunter2» https://host
aws_access_key_id = «{u20}»⏎aws_secret_access_key = «{b40}»
wandb:⏎  entity: me⏎  api_key: «{h40}»⏎  mode: online
db:⏎  password: «letmein»⏎  host: x
    client = Client(api_key="«{a30}»", timeout=3)
    password: str = "«hunter2»"
    conn = connect("db", password='«hunter2»')
    requests.get(url, auth=("me", "«hunter2»"))
RuntimeError: Incorrect API key provided: «{a30}»
401 Unauthorized: invalid api_key '«{a30}1»'
ValueError: bad value for --token: «{a30}»
API key: «{a30}1»
access token: «{a30}1»
secret access key = «{b40}»
client_secret=«{a20}»,client_id=me
<password>«hunter2»</password>
password => «hunter2»
'password' => '«hunter2»'
passphrase: «open sesame street»
token=«{a30}»⏎password=«hunter3»
line one⏎password=«hunter4»
\npassword=«hunter4»\n
password=«hunter2»; token=«{a30}»
MLFLOW_TRACKING_PASSWORD=«letmein» MLFLOW_TRACKING_USERNAME=me
password=«supersecret»
secret_key=«topsecret»
password=«pass(word1)»
password%3D%26 token%3D«{}ghp_{a36}»
jdbc:postgresql://db/x?user=me&password=«hunter2»
Using API key «{a32}» for login
token «{h40}» was rejected
- name: WANDB_API_KEY⏎  value: «{h40}»
- name: DB_PASSWORD⏎  value: "«letmein»"
[{"name": "DB_PASSWORD", "value": "«letmein»"}]
<add key="ApiKey" value="«{a24}»"/>
argv: ['train.py', '--password', '«hunter2»', '--lr', '0.1']
[('password', '«hunter2»'), ('lr', 0.1)]
environ({'HF_TOKEN': '«{a34}»', 'PATH': '/bin'})
os.environ.setdefault('WANDB_API_KEY', '«{h40}»')
{"user": "me", "pass": "«letmein»"}
mysql -uroot -p«hunter2» runs
headers={'X-Api-Key': '«{l40}»'}
auth=HTTPBasicAuth('me', '«hunter2»')
password=`«hunter2»`
password := "«hunter2»"
{"API Key": "«{a24}»"}
const apiKey = '«{a24}»';
cfg['db']['password'] = '«hunter2»'
ENV API_KEY=«{a24}»
aws configure set aws_secret_access_key «{b40}»
setx OPENAI_API_KEY "«{a40}1»"
login(token='«{a34}»', add_to_git_credential=True)
password: |⏎  «hunter2»
"password":⏎  "«hunter2»"
x-amz-security-token: «{b200}»
credentials: me:«hunter2»
smb://dom;me:«hunter2»@host/share
DRIVER={ODBC};UID=me;PWD=«hunter2»
host=h user=me password=«hunter2» dbname=x
%2Ftoken%3D«{a30}»
api_key⏎  Input should be shorter [type=too_long, input_value='«{a24}»', input_type=str]
fatal: Authentication failed for 'https://me:«{a20}»@github.com/x.git/'
(password=«hunter2»)
lr=0.1,password=«hunter2»
a bot https://api.telegram.org/bot«{d9}:AA{w33}»/getMe
"""

# Names and values that stay.
KEPT: list[tuple[str, Any]] = [
    *[(name, value) for name in ("model", "weights") for value in ("yolo11n.pt", "sk-learn-extra")],
    ("tokenizer", "bert-base-uncased"),
    ("tokenizer_name", "meta-llama/Llama-3.1-8B"),
    ("tokenizer_path", "models/tokenizer.model"),
    ("tokenizer_class", "LlamaTokenizerFast"),
    ("tokenizer_kwargs", {"use_fast": True, "padding_side": "left"}),
    ("max_tokens", 4096),
    ("max_new_tokens", 512),
    ("maxTokens", 512),
    ("num_tokens", 1_000_000),
    ("n_tokens", 12.5),
    ("tokens", 128_000),
    ("tokens_per_second", 1234.5),
    ("tokens_seen", 10**9),
    ("total_tokens", "12B"),
    ("token_type", "word-level"),
    ("token_type_ids", [0, 0, 1]),
    ("token_dropout", 0.1),
    ("token_embedding_dim", 768),
    ("token_path", "/home/me/.cache/huggingface/token"),
    ("token_limit", "eight thousand"),
    ("token", 5),
    ("token", True),
    ("token", None),
    ("token", "word"),
    ("token", "a whole sentence of words"),
    ("token", "<|reserved_special_token_1|>"),
    ("pad_token", "<pad>"),
    ("eos_token", "</s>"),
    ("eos_token", "<|endoftext|>"),
    ("bos_token", "<s>"),
    ("bosToken", "<|begin_of_text|>"),
    ("unk_token", "<unk>"),
    ("mask_token", "[MASK]"),
    ("cls_token", "[CLS]"),
    ("sep_token", "[SEP]"),
    ("image_token", "<image>"),
    ("image_token", "IMAGE_PLACEHOLDER_0"),
    ("pad_token", {"content": "<|padding_token|>", "lstrip": False}),
    ("eos_token", "endofsequence"),
    ("decoder_start_token", "translate_en_de"),
    ("stop_token", "###STOP###"),
    ("stop_tokens", ["User:", "Assistant:"]),
    ("special_tokens", ["<a>", "<b>", "additional_token"]),
    ("additional_special_tokens", ["<extra_id_0>", "<extra_id_1>"]),
    ("add_special_tokens", True),
    ("special_tokens_map", {"pad_token": "<pad>"}),
    ("added_tokens_decoder", {"0": {"content": "<unk>", "special": True}}),
    ("pad_token_id", 0),
    ("tokens", ["hello", "world", "unbelievably"]),
    ("use_auth_token", True),
    ("use_auth_token", False),
    ("use_auth_token", "true"),
    ("use_password", True),
    ("password", None),
    ("password", ""),
    ("password", "${DB_PASSWORD}"),
    ("password", "${oc.env:DB_PASSWORD}"),
    ("password", "********"),
    ("password", "<hidden>"),
    ("password", "/run/secrets/db_password"),
    ("password_length", 12),
    ("password_policy", "strong"),
    ("password_file", "/run/secrets/db"),
    ("password_required", "yes, always"),
    ("min_password_length", 8),
    ("secret_name", "prod/wandb"),
    ("secretName", "wandb-api-key"),
    ("secret_arn", "arn:aws:secretsmanager:eu-central-1:123456789012:secret:wandb"),
    ("secrets_dir", "/run/secrets"),
    ("imagePullSecrets", [{"name": "regcred"}]),
    ("secretary", "Jane"),
    ("credentials_file", "creds.json"),
    ("credentials_path", "~/.aws/credentials"),
    ("GOOGLE_APPLICATION_CREDENTIALS", "/etc/gcp/service-account.json"),
    ("credentials", "service-account.json"),
    ("api_key", "${oc.env:WANDB_API_KEY}"),
    ("api_key", "OPENAI_API_KEY"),
    ("api_key", "None"),
    ("api_key_env", "OPENAI_API_KEY"),
    ("api_key_name", "trainer"),
    ("api_keys_url", "https://example.com/keys"),
    ("api_base", "https://api.openai.com/v1"),
    ("api_version", "2024-02-01"),
    ("private", True),
    ("private_key_path", "/home/me/.ssh/id_ed25519"),
    ("private_key", "/home/me/.ssh/id_ed25519"),
    ("public_key", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5"),
    ("key", "val/mAP50-95"),
    ("key", "abc"),
    ("keys", ["lr", "momentum"]),
    ("keypoints", [1, 2, 3]),
    ("kpt_shape", [17, 3]),
    ("key_dim", 64),
    ("key_padding_mask", "causal"),
    ("query_key_value", "fused"),
    ("sort_key", "created_at"),
    ("primary_key", "run_id"),
    ("foreign_key", "3f2504e0-4f89-11d3-9a0c-0305e82c3301"),
    ("partition_key", "2024-06-01-shard-00017"),
    ("metric_key", "metrics/mAP50(B)"),
    ("cache_key", "9b74c9897bac770ffc029102a200c5de9b74c989"),
    ("s3_key", "runs/2024/exp17/weights/best.pt"),
    ("image_key", "img_000000123456"),
    ("key_frames", 12),
    ("monkey", "patched"),
    ("hotkey", "ctrl+shift+p"),
    ("keyboard", "qwerty"),
    ("author", "Jane Doe"),
    ("authors", ["Jane", "John"]),
    ("auto_augment", "randaugment"),
    ("authority", "https://login.example.com"),
    ("auth_type", "oauth2"),
    ("auth_url", "https://auth.example.com/token"),
    ("auth", "basic"),
    ("auth", None),
    ("auth", {"enabled": True, "timeout": 3}),
    ("authenticated", "yes"),
    ("pass", "forward"),
    ("passes", 3),
    ("n_passes", 2),
    ("first_pass", "coarse"),
    ("bypass", "residual"),
    ("compass", "north"),
    ("passthrough", ["a", "b"]),
    ("pass_threshold", 0.5),
    ("encompass", "all of it"),
    ("cookiecutter", "gh:audreyr/cookiecutter-pypackage"),
    ("cookies_file", "cookies.txt"),
    ("hash", "5d41402abc4b2a76b9719d911017c592"),
    ("token_hash", "5d41402abc4b2a76b9719d911017c592"),
    ("sha256", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    ("git_commit", "9b74c9897bac770ffc029102a200c5de9b74c989"),
    ("git_sha", "d23e031"),
    ("uuid", "3f2504e0-4f89-11d3-9a0c-0305e82c3301"),
    ("run_id", "3gq8xk2p"),
    ("wandb_run_id", "3gq8xk2p"),
    ("wandb_run", "https://wandb.ai/me/project/runs/3gq8xk2p"),
    ("session_id", "8f14e45fceea167a5a36dedd4bea2543"),
    ("picture", "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"),
    ("data_uri", "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"),
    ("file", "DSC_20240601_123456_very_long_file_name_of_a_camera_0001.JPG"),
    ("model", "gpt-4o-mini-2024-07-18"),
    ("model", "hf_hub_download"),
    ("model", "hf-internal-testing/tiny-random-BertModel"),
    ("model", "timm/vit_base_patch16_clip_224.laion2b_ft_in12k_in1k"),
    ("name", "ghp"),
    ("name", "npm_package_name"),
    ("name", "AKIA"),
    ("email", "me@example.com"),
    ("username", "me"),
    ("repo", "git@github.com:me/repo.git"),
    ("url", "https://user@example.com:8080/path"),
    ("url", "ssh://git@github.com:22/me/repo.git"),
    ("url", "https://example.com/a@b?x=y:z"),
    ("storage", "sqlite:///optuna.db"),
    ("master_addr", "10.0.0.1:29500"),
    ("master_port", 29500),
    ("license", "AGPL-3.0"),
    ("service", "triton"),
    ("account", "123456789012"),
    ("access", "public-read"),
    ("signature", "(x: Tensor) -> Tensor"),
    ("webhook_enabled", True),
    ("cls_pw", 1.0),
    ("obj_pw", 1.0),
    ("pin_memory", True),
    ("spin", 0.5),
    ("salt_and_pepper", 0.1),
    ("seed", 42),
    ("cwd", "/home/me/project"),
    ("PWD", "/home/me/project"),
    ("OLDPWD", "/scratch/team/run_1"),
    ("tag", "v1.2.3-rc.1+build.5"),
    ("device", "cuda:0"),
    ("token_str", "understanding"),
    ("id2token", {"0": "hello_world"}),
    ("idx_to_token", ["something_long"]),
    ("next_token", "understanding"),
    ("dataset", "glue-sst2-bert-base-uncased-finetuned-2024"),
    ("tokens", "fineweb-edu-10BT-sample"),
    ("prefix_tokens", ["learned_prefix_number_1"]),
    ("secrets", ["WANDB_API_KEY", "HF_TOKEN"]),
    ("has_password", "no"),
    ("num_secrets", 2),
    ("auth", "token"),
    ("token", "${{ secrets.GITHUB_TOKEN }}"),
    ("credentials", "env"),
    ("token_merging", "tome_r16_everywhere"),
    ("low_pass", "butterworth2"),
    ("cookie_policy", "strict"),
    ("backbone", "skresnext50_32x4d"),
    ("weights", "IMAGENET1K_V2"),
    ("ckpt", "s3://bucket/key/epoch=3-step=100.ckpt"),
    ("monitor", {"key": "val_loss", "mode": "min"}),
    ("attention", {"key": "k_proj", "query": "q_proj", "value": "v_proj"}),
    ("state_dict_key", "model.layers.0.weight"),
    ("kms_key_id", "8f14e45f-ceea-167a-5a36-dedd4bea2543"),
    ("client_id", "0oa2hl2inow5Uqc6c357"),
    ("gpu", "GPU-8f14e45f-ceea-167a-5a36-dedd4bea2543"),
    ("rng_key", [0, 42]),
    ("shard_key", "abcdef0123456789abcd"),
    ("oauth_scopes", ["read", "write"]),
    ("keywords", ["a"]),
    ("p_in", 0.5),
    ("pins", 4),
    ("pins", ["A0", "GPIO17"]),
    ("servo_pins", [17, 27]),
    ("passwords", 4),
    ("token", "classification"),
    ("tokens", {"task": "classification", "level": "character"}),
    ("cmd", ["login", "--relogin", "--host", "https://wandb.example.com"]),
    ("cmd", ["git", "commit", "9b74c9897bac770ffc029102a200c5de9b74c989"]),
    ("cmd", ["train.py", "--max-tokens", "4096", "--tokenizer", "bert-base-uncased-2", "--pass"]),
    ("cmd", ["train.py", "--use-auth-token", "--lr", "0.01"]),
    ("cmd", ["train.py", "--token", "$HF_TOKEN"]),
    ("columns", ["user", "password", "token"]),
    ("env", [{"name": "LR", "value": "0.1"}, {"name": "MAX_TOKENS", "value": "40961"}]),
    ("login", {"username": "me", "key": "left"}),
]

# Texts that stay.
KEPT_TEXTS = r"""
token: 5
token: classification
pins: 4
tokens: 128k
max_tokens=100
max_new_tokens: 512, top_p: 0.9
KeyError: 'token'
KeyError: 'password'
the password is wrong
the token is invalid
your password was reset yesterday
password must be at least 8 characters
author=Jane
authors: Jane and John
TypeError: password must be str
TypeError: __init__() got an unexpected keyword argument 'api_key'
TypeError: login() missing 1 required positional argument: 'password'
sk-learn-extra
pip install sk-learn scikit-learn-intelex sklearn-crfsuite
key=value
keys: ['a', 'b']
    token = os.environ["TOKEN"]
    token = os.environ.get("HF_TOKEN", None)
    password = getpass()
    password = getpass.getpass("Password: ")
    api_key=api_key
    client = OpenAI(api_key=api_key, timeout=3)
    client = OpenAI(api_key=cfg.openai.api_key)
    self.token = token or os.getenv("X")
    self.token = get_token(path)
    conn = connect(user=user, password=password)
    headers = {"Authorization": f"Bearer {token}"}
    url = f"postgresql://{user}:{password}@{host}/db"
    def login(user: str, password: str, token: Optional[str] = None) -> None:
    def f(api_key: str | None = None):
    token: str = field(default="")
    if token == expected_token:
    assert password != other
    tokens = tokenizer(text, return_tensors="pt")
    key = jax.random.PRNGKey(0)
    pad_token = tokenizer.pad_token
    tokenizer.pad_token = "<|finetune_right_pad_id|>"
    raise ValueError("api_key is required")
Setting `pad_token_id` to `eos_token_id`:50256 for open-end generation.
Token indices sequence length is longer than the specified maximum (1024 > 512)
SyntaxError: invalid token (train.py, line 3)
Unexpected token: expected a comma
invalid token: unexpected end of input
Authentication token: expired
authorization: required
password=None, token=None
password=***
password: <hidden>
token=${HF_TOKEN}
--token $HF_TOKEN --lr 0.1
set HF_TOKEN=<your token>
api_key: OPENAI_API_KEY is not set
use --token to authenticate, --password is optional
wandb: You can find your API key in your browser here: https://wandb.ai/authorize
wandb: Paste an API key from your profile and hit enter:
wandb: Currently logged in as: me (team). Use `wandb login --relogin` to force relogin
wandb: View run at https://wandb.ai/me/project/runs/3gq8xk2p
Basic authentication is not supported, use Bearer authentication
Basic training with TensorFlow and a Bearer token
Secret sauce: mosaic until epoch 90
the secret: more data
keypoints: 17x3, key_dim: 64
sort_key=created_at, primary_key=run_id
pass@1: 0.43, pass@10: 0.71
passed: 12, failed: 0, bypass=True
first pass: 0.5, second pass: 0.7
commit 9b74c9897bac770ffc029102a200c5de9b74c989 (HEAD -> main)
sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
id 3f2504e0-4f89-11d3-9a0c-0305e82c3301
data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk
https://example.com/search?q=token&page=2
https://example.com/data?key=coco128&split=val
https://docs.python.org/3/library/secrets.html#secrets.token_hex
https://user@example.com/x and me@example.com
http://localhost:6006/#scalars, tcp://10.0.0.1:29500
git@github.com:me/repo.git, ssh://git@github.com/me/repo
-----BEGIN CERTIFICATE-----⏎MIIDdzCCAl+gAwIBAgIEAgAAuTANBgkqhkiG9w0BAQ⏎-----END CERTIFICATE-----
-----BEGIN PUBLIC KEY-----⏎MFwwDQYJKoZIhvcNAQEBBQADSwAwSAJBAK⏎-----END PUBLIC KEY-----
expected -----BEGIN PRIV{}ATE KEY----- at the start of the file
ssh-ed25519 AAAAC3NzaC1lZDI1NTE5 me@host
File "/usr/lib/python3.11/site-packages/huggingface_hub/utils/_token.py", line 12, in get_token
hf_hub_download(repo_id="bert-base-uncased", filename="tokenizer.json")
hf_transfer, hf_xet and hf_olmo are installed
pypi-publish, npm_config_cache and SG.module are names
loss=0.5, lr=1e-3: epoch 3/10, 12:34:56
token accuracy: 0.93, token_type: bpe, tokenizer: bert
license: AGPL-3.0, access: public, service: triton
cookie: none
100%|####| 10/10 [00:01<00:00, 9.9it/s, tokens=123k, lr=1e-3]
[rank0]: KeyError: 'api_key'
RuntimeError: token embeddings: expected 768, got 512
    password = input('Password: ')
    tok = re.findall("token=([a-z0-9]+)", url)[0]
    parser.add_argument('--token', type=str, default=None, help='HF token')
    parser.add_argument("--password", "-p", help="x")
    @click.option("--password", "password", prompt=True)
    os.environ["WANDB_API_KEY"] = args.wandb_key
    env["WANDB_API_KEY"] = api_key
    headers['Authorization'] = 'Bearer ' + token
    return {"access_token": access_token, "password": password}
    self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
    self.token = str(uuid.uuid4())
    secret = parts[0]
    auth = (
    def f(auth: AuthType, cookies: RequestsCookieJar, task_token: TaskToken) -> None:
usage: train.py [--token TOKEN] [--password PASSWORD] [--api-key API_KEY]
  --api-key KEY  your key
JSONDecodeError: Unexpected token '<' at line 1
Unexpected token 'foobar12' in JSON at position 3
unknown token 'abc12345' skipped
Added token: '<image_placeholder_1>'
token 12345 of 100000
password (optional): not set
key = 'val/loss', sort key: 'created_at_1'
api_key=%(api_key)s, token={{ token }}
HF_TOKEN=${{ secrets.HF_TOKEN }}
arn:aws:secretsmanager:eu-central-1:123456789012:secret:wandb-1
:param token: Optional token to send along with the request.
the access key: see wiki
dict_keys(['token', 'password'])
Index(['id', 'token', 'password'], dtype='object')
password is sha256 hashed
Namespace(tokenizer='bert-base-uncased', max_tokens=4096, use_auth_token=True, pad_token='<pad>')
"""

ONE = np.ones(1)
EVENTS: list[Any] = [
    EpochStarted(epoch=0),
    EpochEnded(epoch=0, outcome="completed"),
    MetricsLogged(values={"token": 1.0, "password": 2.0}, phase="train"),
    ModelDescribed(classes=["password", "hunter2"], speed_ms={"token": 1.0}),
    CurveLogged(key="k", x=np.arange(2.0), y=np.ones((1, 2)), classes=["token"]),
    ConfusionMatrixLogged(key="k", matrix=np.ones((1, 1)), classes=["secret"]),
    HistogramLogged(key="k", counts=np.ones(1), edges=np.arange(2.0)),
    UnknownEvent("later", {"password": "hunter2"}),
]


def encoded(event: Any) -> str:
    """Return an event as it goes to disk; in it, JSON has escaped what it must."""
    return encode(Record(seq=1, run="r", time=0.0, event=event)).decode()


def survives(secret: str, event: Any) -> bool:
    return json.dumps(secret, ensure_ascii=False)[1:-1] in encoded(event)


def everywhere(line: str) -> list[Any]:
    """Return an event for each field that can contain a text."""
    return [
        RunStarted(notes=line),
        RunStarted(name=line, project=line, group=line, job_type=line, task=line, tags=["a", line]),
        RunStarted(params={"a": {"b": [1, {"notes": line}]}, line: True}),
        ParamsUpdated(params={"command": ["python", line]}),
        CheckpointSaved(path="p", kind="last", metadata={"note": line}),
        ArtifactLogged(name="a", metadata={"note": line}),
        ImageLogged(key="k", path="p", caption=line),
        TableLogged(key="k", columns=["n", "text"], rows=[[1, line], [2, {"inner": line}]]),
        TextLogged(key="k", text=line),
        TextLogged(key=line, text=""),
        MetricsLogged(values={"loss": 1.0, line: 2.0, f"a\n{line}": 3.0}, phase="train"),
        ModelDescribed(classes=["a", line], speed_ms={line: 1.0}, extra={line: 1.0}),
        ImageLogged(key=line, path="p"),
        CurveLogged(key=line, x=ONE, y=np.ones((1, 1)), classes=[line], title=line, x_label=line),
        ConfusionMatrixLogged(key=line, matrix=np.ones((1, 1)), classes=[line]),
        HistogramLogged(key=line, counts=ONE, edges=np.arange(2.0)),
        TableLogged(key=line, columns=["n", line], rows=[[1, None]]),
        ArtifactLogged(name=line, kind=line, aliases=[line]),
        CheckpointSaved(path="p", kind="last", metrics={line: 1.0}),
        AlertRaised(title=line, text=line, level="error"),
        EnvironmentDescribed(
            command=["python", line],
            scheduler={"SLURM_JOB_NAME": line},
            git=GitState(branch=line, remote=line, diff=f"-a\n{line}\n"),
        ),
        ConsoleLogged(stream="stdout", text=f"epoch 1\n{line}", first_line=1),
        RunEnded(
            status="failed",
            reason=line,
            best=Best(metric=line, value=1.0),
            error=Failure(type="E", message=line, traceback=f"Traceback:\n{line}\nE: {line}\n"),
        ),
    ]


def test_the_corpora_are_broad() -> None:
    """There are hundreds of secrets and of look-alikes, no two secrets the same way."""
    secrets = [*lines(NAMED), *lines(TEXTS)]
    assert len(secrets) == len(set(secrets))
    assert len(secrets) >= 300
    assert len(KEPT) + len(lines(KEPT_TEXTS)) >= 250
    assert all(split(line)[1] for line in lines(TEXTS))


@pytest.mark.parametrize("line", lines(NAMED))
def test_a_secret_under_its_name_goes(line: str) -> None:
    """A value with a secret name is replaced, in params, argument lists and tables."""
    name, _, shape = line.partition(" ")
    secret = made(shape)
    flag = "--" + name.replace("_", "-")
    events = [
        RunStarted(params={name: secret, "lr": 0.1}),
        ParamsUpdated(params={"trainer": {"logger": [{name: secret}]}}),
        ParamsUpdated(params={"env": [{"name": name, "value": secret}]}),
        ParamsUpdated(params={"argv": ["train.py", flag, secret, "--epochs", "3"]}),
        CheckpointSaved(path="p", kind="last", metadata={"config": {name: secret}}),
        TableLogged(key="k", columns=["epoch", name], rows=[[1, secret], [2, secret]]),
        TextLogged(key=name, text=secret),
        TextLogged(key="config", text=f'{{"{name}": {json.dumps(secret)}}}'),
        TextLogged(key="env", text=f"lr=0.1\n{name}='{secret}'"),
    ]
    assert [] == [event for event in map(redaction.event, events) if survives(secret, event)]


@pytest.mark.parametrize("line", lines(TEXTS))
def test_a_secret_in_a_text_goes(line: str) -> None:
    """Secrets are replaced in every text field of an event, and the event still encodes."""
    whole, secrets = split(line)
    for event in map(redaction.event, everywhere(whole)):
        assert [] == [secret for secret in secrets if survives(secret, event)]
        assert type(event) is type(decode(encoded(event)).event)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("postgres://me:hunter2@db:5432/x?a=b", "postgres://me:[redacted]@db:5432/x?a=b"),
        ("train.py --api-key abc --lr 0.1", "train.py --api-key [redacted] --lr 0.1"),
        ("x --password=abc -v", "x --password=[redacted] -v"),
        ("GET /a?token=abcdefgh1&b=c", "GET /a?token=[redacted]&b=c"),
        ("{'password': 'a b', 'lr': 1}", "{'password': '[redacted]', 'lr': 1}"),
        ("Authorization: Bearer abcdefgh1", "Authorization: Bearer [redacted]"),
        ("password=hunter2, or so.", "password=[redacted], or so."),
        ("Uid=me;Pwd=a,b;Port=1", "Uid=me;Pwd=[redacted];Port=1"),
        ("a\npassword: hunter2\nb", "a\npassword: [redacted]\nb"),
    ],
)
def test_only_the_secret_goes(line: str, expected: str) -> None:
    """The text around a secret stays to the letter."""
    assert expected == redaction.text(line)


def test_look_alikes_stay() -> None:
    """Names, values and texts that only look like secrets are neither changed nor copied."""
    values = [{name: value} for name, value in KEPT]
    values += [{"outer": [{"inner": {name: value}}]} for name, value in KEPT]
    values += [event.params for event in everywhere("") if isinstance(event, ParamsUpdated)]
    assert [] == [value for value in values if redaction.params(value) is not value]
    texts = [split(line)[0] for line in lines(KEPT_TEXTS)]
    assert [] == [each for each in texts if redaction.text(each) is not each]
    together = "\n".join(texts)
    assert together == redaction.text(together)
    for line in texts:
        assert [] == [event for event in everywhere(line) if redaction.event(event) is not event]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_without_texts_passes(event: Any) -> None:
    """Numbers, arrays, class names and events of a newer schema are handed on as they are."""
    assert event is redaction.event(event)


def test_every_event_type_is_looked_at_or_has_no_text() -> None:
    """A new type of event needs a decision on whether secrets can be in it."""
    looked_at = {type(event) for event in everywhere("")}
    assert set(EVENT_TYPES) == looked_at | {EpochStarted, EpochEnded}


def test_two_names_with_a_secret_stay_two() -> None:
    """No metric is lost because the names of two become the same."""
    words = [made(f"{{}}ghp_{{a3{n}}}") for n in range(2)]
    logged = MetricsLogged(
        values={f"acc/{word}": float(n) for n, word in enumerate(words)}, phase="p"
    )
    assert {"acc/[redacted]": 0.0, "acc/[redacted]*": 1.0} == redaction.event(logged).values


@pytest.mark.parametrize(
    "argv",
    [
        "login «{h40}»",
        "wandb login «{h40}»",
        "wandb login --relogin «{h40}»",
        "comet login «{a25}»",
        "sshpass -p «hunter2» ssh me@host",
        "curl -u me:«hunter2» https://host",
        "docker login -u me -p «hunter2» ghcr.io",
        "mysql -uroot -p«hunter2» runs",
    ],
)
def test_a_secret_among_arguments_goes(argv: str) -> None:
    """A list of arguments is examined as a command."""
    line, secrets = split(argv)
    arguments = ["train data.py", *line.split(" "), "a b"]
    new = redaction.params({"argv": arguments})["argv"]
    assert [] == [secret for secret in secrets if secret in " ".join(new)]
    changed = [(a, b) for a, b in zip(arguments, new, strict=True) if a != b]
    assert len(secrets) == len(changed)


def test_a_copy_has_no_secret_in_its_name(tmp_path: Path) -> None:
    """The name that a tracker shows of a file is redacted; the path that is opened is not."""
    word = made("{}ghp_{a36}")
    file = tmp_path / f"{word}.png"
    file.write_bytes(b"picture")
    folder = RunFolder.create([tmp_path / "runs"], "run")
    blob = Blobs(folder).add_file(str(file))
    assert blob is not None
    assert (str(file), "_redacted_.png") == (blob.path, blob.name)


def test_paths_and_the_rest_of_an_event_stay() -> None:
    """Of an event with a secret, only what has the secret in it is new."""
    place = "/data/password=hunter2"
    started = RunStarted(save_dir=place, params={"password": "hunter2"}, resumed=Resumed(run="r"))
    new = redaction.event(started)
    assert (place, {"password": REDACTED}) == (new.save_dir, new.params)
    assert started.resumed is new.resumed
    saved = CheckpointSaved(path=place, kind="last", metrics={"token": 1.0})
    assert saved is redaction.event(saved)
    ended = RunEnded(
        status="failed",
        error=Failure(type="password=x", message="token: 5", traceback="password='hunter2'"),
        best=Best(metric="secret", value=1.0),
    )
    assert "password='[redacted]'" == redaction.event(ended).error.traceback
    assert "password=x" == redaction.event(ended).error.type
    assert ended.best is redaction.event(ended).best


def test_all_leaves_under_a_secret_name_go() -> None:
    """Lists and dicts with a secret name keep their structure and lose their strings."""
    params = {"user": "me", "more": ["a", {"b": "c"}], "on": True, "port": 1}
    expected = {"user": REDACTED, "more": [REDACTED, {"b": REDACTED}], "on": True, "port": 1}
    assert {"credentials": expected} == redaction.params({"credentials": params})


@pytest.mark.parametrize(
    ("name", "value", "gone"),
    [
        ("password", 1234, True),
        ("passcode", 12.5, True),
        ("passphrase", math.nan, True),
        ("secret", 7, True),
        ("password", True, False),
        ("secret", None, False),
        ("password", "", False),
        ("token", 12345678, False),
        ("api_key", 12345678, False),
        ("auth", 1, False),
    ],
)
def test_numbers_are_secrets_only_as_passwords(name: str, value: Any, gone: bool) -> None:
    """A password may be a number; a token is counted, and True and None say nothing."""
    params = {name: value}
    if gone:
        assert {name: REDACTED} == redaction.params(params)
    else:
        assert params is redaction.params(params)


def test_the_parts_without_secrets_are_not_copied() -> None:
    """A change makes new containers on the way to it and nowhere else."""
    params: dict[str, Any] = {"clean": {"a": [1]}, "list": [{"b": 2}, "password=hunter2"]}
    new = redaction.params(params)
    assert {"clean": {"a": [1]}, "list": [{"b": 2}, "password=[redacted]"]} == new
    assert params["clean"] is new["clean"]
    assert params["list"][0] is new["list"][0]


def test_names_of_the_users_own() -> None:
    """Any value whose name the user listed is replaced, however the name is written."""
    keys = frozenset({"customer_id", "Site"})
    params = {
        "customerId": 17,
        "CUSTOMER-ID": {"a": 1},
        "data.site": True,
        "sites": "stay",
        "argv": ["--customer-id", "17", "--customer-id=17", "--site-map", "x"],
        "deep": [{"site": ["Berlin"]}],
    }
    expected = {
        "customerId": REDACTED,
        "CUSTOMER-ID": REDACTED,
        "data.site": REDACTED,
        "sites": "stay",
        "argv": ["--customer-id", REDACTED, f"--customer-id={REDACTED}", "--site-map", "x"],
        "deep": [{"site": REDACTED}],
    }
    assert expected == redaction.params(params, keys)
    assert RunStarted(params=expected) == redaction.event(RunStarted(params=params), keys)
    table = TableLogged(key="k", columns=["epoch", "site"], rows=[[1, "Berlin"], [2]])
    assert [[1, REDACTED], [2]] == redaction.event(table, keys).rows
    assert params is redaction.params(params)


def test_secrets_as_keys_go_and_no_value_is_lost() -> None:
    """A secret that is the key of a dict goes too, and two such keys stay two."""
    params = {split(f"https://me:«{word}»@host")[0]: word for word in ("hunter2", "hunter3")}
    new = redaction.params(params)
    assert ["hunter2", "hunter3"] == list(new.values())
    assert "hunter" not in "".join(new)


@pytest.mark.parametrize(
    "values",
    [
        {"username": "me", "key": "{h32}"},
        {"user": "me", "pass": "hunter2"},
        ["password", "hunter2"],
        {"auths": {"ghcr.io": {"auth": "{b24}"}}},
        {"key": "db_password", "value": "hunter2"},
    ],
)
def test_neighbours_tell_a_secret(values: Any) -> None:
    """A key next to a user's name, and a value next to its name, are secrets."""
    values = json.loads(made(json.dumps(values)))
    secret = list(values.values())[-1] if isinstance(values, dict) else values[-1]
    secret = secret if isinstance(secret, str) else secret["ghcr.io"]["auth"]
    assert secret not in json.dumps(redaction.params(values))


LONG = 64 * 1024
PEM = made("-----BEGIN PRIV{}ATE KEY-----")
ADVERSARIAL = [
    "a", " ", "\n", "-", "=", ":", "://", "@", "\\", '"', "'", "[", "(", "{", "<", ">", "&", "?",
    ".", "a ", "a=", "a: ", "--a ", "--token ", "--token=", "token=", "tokens=|", "token:",
    "token='", 'token="', "token=[", 'token=["', "api_key=['", "password=", "password: ",
    "password is ", "password '", "key: ", "token=a(", "token=/home/", "token=$A", "token={",
    "token=<", "tokens=-", "api_key=http://", "token=none&", "token=a&", "token=[redacted]",
    "x_token=a&y_token=b&", "://a:", "://a:a", "://a:a:", "https://u:p", "a@", "sk-", "sk-a",
    "sk-ant-", "eyJ", "eyJa.", "eyJé", "-eyJ", "eyJa.eyJ", "_eyJaaaaaa.aaaaaa", "SG.",
    "SG.aaaaaaaaaaaaaaaa.", "ghp_", "ghp_a ", "AKIA", "1//0", "-----BEGIN ",
    PEM, PEM + "\n\n\n", "BEGIN ", "Bearer ",
    "Bearer a", "Basic ", "Basic aaaaaaaa ", "login ", "login a ", "login a password ", "curl ",
    "curl -u ", "sshpass ", "sshpass -p", "wandb login ", "wandb login --a ", "?sig", "?a",
    "?code=", "?key=aaaaaaa", "&a-", "MaaaaaaaaaaaaaaaaaaaaaaaaaM", "00000000:AA", "aaa0Q~",
    "hooks.slack.com/", "discord.com/api/webhooks/", "é", "\u2028", "\x00", "token\t", "cookie: ",
    "authorization: a", "aA", "a_", "A1", "%20", "\\n", '\\"', "b'", "token=\\'", "  token=a\n",
    "-- ", "password\n", "name: a\nvalue: ", "api_key\n", "input_value=", "key: a ", "a\n  ",
]  # fmt: skip


@pytest.mark.parametrize("piece", ADVERSARIAL)
def test_no_text_makes_it_hang(piece: str) -> None:
    """A long text of what invites a search to start again ends, and so does a secret behind it."""
    whole = (piece * LONG)[:LONG]
    secret = made("{}ghp_{a36}")
    new = redaction.text(f"{whole}\n{secret}\npassword=hunter22")
    assert (False, False) == (secret in new, "hunter22" in new)
    redaction.text(whole)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
)
WORDS = """
    password token api_key = ' " hunter2 { } [ ] ( ) :// me: @ -- & ; \\ [redacted] < > , secret
    ?sig= abcdefgh12345678 cookie ----- eyJabcdef. sk- $ ${ f' None /home/ .json Bearer Basic is
"""
words = st.sampled_from([*WORDS.split(), " ", "\n", ": ", "wandb login ", PEM])
mixtures = st.lists(words, max_size=12).map("".join)
nested = st.dictionaries(
    mixtures | st.sampled_from(["password", "token", "auth", "tokens", "key", "value", "name"]),
    st.recursive(
        mixtures | st.integers(-9, 9) | st.none(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(mixtures, inner, max_size=3),
    ),
    max_size=4,
)


def every_name(value: str) -> list[tuple[int, str]]:
    """Return where names begin, found without any sign of them."""
    return [(found.start(), found["name"]) for found in patterns.NAME.finditer(value)]


def precisely(event: Any, keys: frozenset[str] = frozenset()) -> Any:
    """Return what redaction makes of an event where nothing is skipped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redaction, "value_may_contain_secret", lambda value, keys: True)
        patch.setattr(patterns, "may_contain_secret", lambda value: True)
        patch.setattr(patterns, "has_shape", lambda value: True)
        patch.setattr(patterns, "AFTER_SIGNS", ("",))
        patch.setattr(patterns, "find_names", every_name)
        redaction.has_secret.cache_clear()
        found = redaction.event(event, keys)
        redaction.has_secret.cache_clear()
        return found


def test_no_secret_of_the_corpora_is_skipped() -> None:
    """Each text with a secret is found in need of a closer look, alone and among others."""
    texts = [split(line)[0] for line in lines(TEXTS)]
    texts += [
        f"{name}={made(shape)}" for name, _, shape in (n.partition(" ") for n in lines(NAMED))
    ]
    names = [line.partition(" ")[0] for line in lines(NAMED)]
    skipped = [each for each in [*texts, *names] if not patterns.may_contain_secret(each)]
    assert [] == skipped
    assert [] == [each for each in texts if not patterns.may_contain_secret(f"a b\n{each}\nc")]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(mixtures, max_size=3), max_size=3), mixtures, nested)
def test_what_is_skipped_has_no_secret(
    rows: list[list[str]], line: str, params: dict[str, Any]
) -> None:
    """The quick look at events leads to what the closer look at all of them finds."""
    table = TableLogged(key="k", columns=["a", "b", "c"], rows=[list(row) for row in rows])
    for event in [table, *everywhere(line), RunStarted(params=params)]:
        for keys in (frozenset[str](), frozenset({"me"})):
            assert precisely(event, keys) == redaction.event(event, keys)


@given(values, st.text())
def test_nothing_makes_it_raise(value: Any, line: str) -> None:
    """An event with any plain values and texts still encodes after redaction."""
    redaction.params(value)
    for event in [*everywhere(line), RunStarted(params={"password": value, line: value})]:
        encoded(redaction.event(event))
        encoded(redaction.event(event, frozenset({line, "b"})))


@given(nested, mixtures)
def test_twice_is_once(params: dict[str, Any], line: str) -> None:
    """What was redacted is left as it is by a second time."""
    for event in [*everywhere(line), RunStarted(params=params)]:
        once = redaction.event(event)
        assert once == redaction.event(once)
    once = redaction.params(params)
    assert once is redaction.params(once)


class Hostile(str):
    def __getitem__(self, key: Any) -> str:
        raise RuntimeError("slice")

    def strip(self, chars: str | None = None) -> str:
        raise RuntimeError("strip")


class HostileDict(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError("items")


@pytest.mark.parametrize("value", [object(), b"x", {1}, 3 + 4j, Hostile("a"), HostileDict(a=1)])
def test_values_that_are_not_plain_do_not_raise(value: Any) -> None:
    """What was never normalised is handed on or replaced, and nothing is raised."""
    redaction.text(value)
    for params in (value, {"password": value}, [value], {1: value}, (value, "password=hunter2")):
        redaction.params(params)


def test_what_is_too_deep_to_look_at_goes() -> None:
    """A value that holds itself, which normalize never leaves, ends."""
    loop: dict[str, Any] = {"password": "hunter2"}
    loop["loop"] = loop
    assert "hunter2" not in json.dumps(redaction.params(loop))


def test_a_clean_table_is_not_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a table without secrets, no row is examined separately."""
    looked_at: list[object] = []

    def look(row: object, *_: object) -> object:
        looked_at.append(row)
        return row

    monkeypatch.setattr(redaction, "_list", look)
    rows = [[n, 0.5, f"img_{n}.jpg"] for n in range(100)]
    table = TableLogged(key="t", columns=["n", "score", "file"], rows=rows)
    assert table is redaction.event(table)
    assert [] == looked_at
    rows[7] = [7, 0.5, "password=hunter2"]
    assert redaction.event(table) is not None
    assert [rows[7]] == looked_at
