"Packaging: every fact is read from settings.ini, so there is one place to change it."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

if cfg["license"] != "apache2":
    raise SystemExit("setup.py knows only the Apache-2.0 license")

readme = (here / "README.md").read_text(encoding="utf-8")
pictures = cfg["git_url"].replace("github.com", "raw.githubusercontent.com") + f"/{cfg['branch']}/nbs/images/"
pages = f"{cfg['git_url']}/blob/{cfg['branch']}/nbs/"
readme = readme.replace("](nbs/images/", f"]({pictures}").replace("](nbs/", f"]({pages}")  # read elsewhere

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
        "Issues": cfg["git_url"] + "/issues",
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {cfg['audience']}",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
        *(f"Programming Language :: Python :: {v}" for v in cfg["python_tested"].split()),
    ],
    license="Apache-2.0",
    packages=find_packages(include=[cfg["lib_name"], cfg["lib_name"] + ".*"]),
    include_package_data=True,
    package_data={cfg["lib_name"]: ["py.typed"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()}
    | {k[len("extra_") :]: v.split() for k, v in cfg.items() if k.startswith("extra_")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
